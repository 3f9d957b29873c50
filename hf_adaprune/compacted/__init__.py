"""The classes of models made smaller, and the layers that they are built from."""
