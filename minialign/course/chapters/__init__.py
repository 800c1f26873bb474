"""The exercises of each chapter, a file each with a list `exercises`, which `check.registered` reads."""
