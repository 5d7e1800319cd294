"""The cells of an experiment in one database: planned, claimed, finished and ranked, whoever trains them."""
