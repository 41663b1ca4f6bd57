"""Where pictures come from: what lies in a folder, what is taken of it, and how one is decoded."""
