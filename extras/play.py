"""Draw a goal with the mouse, and watch the planner go there.

    python -m extras.play assets/nano.pt

On the left is the goal: drag its agent or its T, and turn the T with the mouse wheel. When you let go, a plan
is made and played on the right, from where the last one ended, for twice as many env steps as the proposal
can plan. `python lewm.py --eval assets/nano.pt --goal ...` does the same without a screen, and leaves a GIF.
"""

import argparse
import dataclasses
import math
import os
import sys

import numpy as np

import lewm
import pusht
from extras.planning import planned

SIZE = 256          # px, side of the pictures in the window; the board has pusht.BOARD px
TURN = 10           # degrees for each step of the mouse wheel

class Board:
    """A window with two pictures, and what they show: `goal` and `state`, (7,) each."""
    def __init__(self, model, figure, seed=0):
        cfg = model.cfg
        model.cfg = dataclasses.replace(cfg, **cfg.reaching(cfg.frame_skip * cfg.proposal_horizon))
        rng = np.random.default_rng(seed)
        self.model = model
        self.figure = figure
        self.state = pusht.random_state(rng)
        self.goal = pusht.random_state(rng)
        self.held = None                                            # what the mouse holds: "agent" or "T"
        self.axes = figure.subplots(1, 2)
        self.images = [axis.imshow(picture) for axis, picture in zip(self.axes, self.pictures())]
        for axis, title in zip(self.axes, ("the goal: drag it, turn the T with the wheel", "")):
            axis.set_title(title, fontsize=9)
            axis.set(xticks=[], yticks=[])
        connect = figure.canvas.mpl_connect
        connect("button_press_event", self.press)
        connect("motion_notify_event", self.move)
        connect("button_release_event", self.release)
        connect("scroll_event", self.turn)

    def pictures(self):
        return pusht.pictures(np.stack([self.goal, self.state]), SIZE)

    def draw(self, words=None):
        for image, picture in zip(self.images, self.pictures()):
            image.set_data(picture)
        if words is not None:
            self.axes[1].set_title(words, fontsize=9)
        self.figure.canvas.draw_idle()

    def place(self, event):
        """Where the mouse is on the board, px (2,), or None outside of the goal's picture."""
        inside = event.inaxes is self.axes[0]
        return np.array([event.xdata, event.ydata]) * pusht.BOARD / SIZE if inside else None

    def press(self, event):
        place = self.place(event)
        if place is not None:
            on_the_agent = math.dist(place, self.goal[:2]) <= pusht.AGENT_RADIUS + 5
            self.held = "agent" if on_the_agent else "T"

    def move(self, event):
        place = self.place(event)
        if self.held and place is not None:
            part = slice(0, 2) if self.held == "agent" else slice(2, 4)
            self.goal[part] = place.clip(30, pusht.BOARD - 30)
            self.draw()

    def turn(self, event):
        if self.place(event) is not None:
            self.goal[4] = (self.goal[4] + math.radians(TURN * event.step)) % (2 * math.pi)
            self.draw()

    def release(self, event):
        if self.held:
            self.held = None
            if pusht.clear(self.goal):
                self.plan()
            else:
                self.draw("the agent lies on the T: move it away")

    def plan(self):
        """Plan from `state` to `goal`, and show what happens."""
        self.draw("planning ...")
        self.figure.canvas.flush_events()
        (states,), _ = planned(self.model, self.state[None], self.goal[None], self.model.cfg.budget)
        for self.state in states:
            self.draw("")
            self.figure.canvas.start_event_loop(0.05)
        self.draw(pusht.outcome(self.state, self.goal))

# ======== Command line ================================================================================

def parse_arguments(argv):
    parser = argparse.ArgumentParser(description="Draw a goal with the mouse.", allow_abbrev=False)
    parser.error = lambda text: sys.exit(f"play.py: {text}; see python -m extras.play --help")
    flag = parser.add_argument
    flag("checkpoint", type=os.path.expanduser, help="a model of Push-T")
    flag("--device", help="cpu, cuda, cuda:1, mps; default: the best there is")
    return parser.parse_args(argv)

def main(argv):
    given = parse_arguments(argv)
    from matplotlib import pyplot
    model, _ = lewm.load_checkpoint(given.checkpoint, lewm.pick_device(given.device))
    figure = pyplot.figure(figsize=(9, 5), layout="constrained")
    advice = f"python lewm.py --eval {given.checkpoint} --goal 300,200,256,300,45 leaves a GIF instead"
    lewm.require(figure.canvas.required_interactive_framework, f"no window can be opened here; {advice}")
    board = Board(model, figure)                    # kept: matplotlib holds its methods only weakly
    pyplot.show()
    return board

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"play.py: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit("play.py: stopped")
