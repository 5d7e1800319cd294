"""Learning rules whose hidden layers each learn from a loss of their own, through matrices that learn with them."""
