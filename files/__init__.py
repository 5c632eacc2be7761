"""What lies on disk and on servers: checkpoints and downloads."""
