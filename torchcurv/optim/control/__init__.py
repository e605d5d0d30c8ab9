"""How steps are sized: the quadratic model of the loss, and the damping."""
