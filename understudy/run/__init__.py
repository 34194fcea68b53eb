"""What every run has, in both worlds: its directory, seeds, progress, configuration, pictures."""
