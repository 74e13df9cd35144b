"""Scripts to run as they stand and to copy from."""
