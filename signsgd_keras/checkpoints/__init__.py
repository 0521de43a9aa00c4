"""Files and arrays of an optimizer's state: which optimizer wrote them, and how each replica goes on from them."""
