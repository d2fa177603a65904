"""What modules hold in the place of a parameter: in an inner loop, in a replica."""


def as_attribute(layer, name, t):
    delattr(layer, name)
    setattr(layer, name, t)


def as_buffer(layer, name, t):
    delattr(layer, name)
    layer.register_buffer(name, t)
