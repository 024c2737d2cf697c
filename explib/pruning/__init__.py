"""The method: layers, scores, criteria, masks, counting, filters, checkpoints."""
