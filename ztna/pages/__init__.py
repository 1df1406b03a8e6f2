"""What a browser shows of a daemon and of a mesh.

`seen` reads what /status says, `mesh` makes nodes, edges and services of it, `picture` draws them, `views` make the
sections of a page, `markup` turns elements into HTML or into JSON that `static/page.js` builds the same elements
from. All of these are pure. `live` serves them, and sends what has changed as server-sent events.
"""
