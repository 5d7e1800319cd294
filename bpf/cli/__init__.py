"""The command line: commands, their options, and how errors become text and exit codes."""
