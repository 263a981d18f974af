"""The Mixture-of-Experts layer: router, balance, experts, and the exchange of tokens between devices."""
