"""Which features contrastive objectives learn and which they suppress, on data whose features are known."""
