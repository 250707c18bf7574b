"""The process beside training in which models are made."""
