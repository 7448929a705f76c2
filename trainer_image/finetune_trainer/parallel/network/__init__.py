"""What ranks send to each other: how fast the network is, and which collective they are in."""
