"""A small demonstration: a packaged base, a generated task, and a comparison of methods."""
