"""The Hydra tree, packaged as `flexpert.conf`: one file per stage, one folder per group."""
