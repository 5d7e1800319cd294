"""The stacked networks and their arithmetic: layers, activations, initialisers, losses, optimizers, random numbers."""
