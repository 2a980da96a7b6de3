"""Does every kind of adapter do what PEFT does, in any batch? Oracle, recipes, checks."""
