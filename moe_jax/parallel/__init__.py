"""The mesh: logical axes of arrays, where they lie, and when XLA communicates."""
