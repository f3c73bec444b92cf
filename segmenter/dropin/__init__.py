"""The kernels inside models that somebody else built: recognised, verified, guarded at each call."""
