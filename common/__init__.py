"""What all programs share and no reader comes for: flags, files, ranks, run folders."""
