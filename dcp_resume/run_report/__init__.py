"""One page on a run: what its saves took, where its bytes lie, what retention will delete."""
