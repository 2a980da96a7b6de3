"""What stands between the network and the event loop."""
