"""What commands write and open again: files with a sidecar, and bundles.

`opening.open_artefact` opens any of them.
"""
