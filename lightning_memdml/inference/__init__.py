"""A network applied to images: code that the methods of a learner and the commands share."""
