"""Programs that the runner starts in processes of their own, one for each measurement."""
