"""Everything of a decoder that is not Mixture of Experts."""
