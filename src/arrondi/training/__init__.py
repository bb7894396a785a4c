"""Training in few bits: layers whose latent weights are float and whose products are not."""
