"""A package, so that one of this name among the installed ones does not take its place."""
