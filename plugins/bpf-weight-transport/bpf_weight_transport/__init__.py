"""Learning rules whose backward weights come near the forward ones without being carried there."""
