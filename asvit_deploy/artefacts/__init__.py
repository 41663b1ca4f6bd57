"""What commands write and open again: files with a sidecar, and bundles."""
