"""Using a network on images: what the methods of a learner and the commands share."""
