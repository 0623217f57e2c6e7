"""The paper's claims, run: what contrastive learning suppresses, and what its stages recover."""
