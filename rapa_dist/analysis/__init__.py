"""What a trained network is made of: similarity of tiles, votes, reduction, attacks, and the theory's regulariser."""
