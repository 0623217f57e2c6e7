"""Study of feature suppression: which features contrastive learning suppresses, and which its stages recover."""
