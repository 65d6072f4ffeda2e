"""Parts of networks whose width can be cut: where their units are, and what stays when all of them go."""
