"""How many servers a load needs: a simulation that replays what steps were measured to cost."""
