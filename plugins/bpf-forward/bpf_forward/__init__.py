"""Learning rules that need no backward pass, only more than one forward."""
