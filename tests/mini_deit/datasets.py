"""As in DeiT, there is a module of this name, and ours has to take its place."""
