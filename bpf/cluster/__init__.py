"""Workers on the nodes of a Ray cluster, and the study and the files that they reach through the driver."""
