"""`trainer doctor`: whether this machine can train, in a table with remedies."""
