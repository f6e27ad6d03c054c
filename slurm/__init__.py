"""The scripts of Slurm jobs, as data of the package `flexpert.slurm`."""
