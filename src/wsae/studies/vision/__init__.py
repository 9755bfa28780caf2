"""Figures 4 and 5 of the paper: SAEs and WSAEs on embeddings of contrastively pretrained backbones (Section 5.2.2)."""
