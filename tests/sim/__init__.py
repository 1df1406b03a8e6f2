"""The whole mesh in one process on a clock of its own: what decides in relay, agent and connector, and the wire.

`weather` has the clock and the connections, which lose, delay, reorder, repeat and are cut, by a seed; `mesh` the
daemons, each as thin as can be around its own deciding modules. One run is a minute of bad weather and then calm.
"""
