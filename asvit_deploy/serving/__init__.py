"""Artefacts as servers take them: what `package` writes, and what of it runs inside Triton."""
