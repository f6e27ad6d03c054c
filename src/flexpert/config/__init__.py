"""Configuration: the schema (`groups`, `stages`) and how a command line becomes a config (`compose`)."""
