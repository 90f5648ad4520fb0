"""One arrangement per action (positions, directions, limbs and props of the actors), and the backdrops.

Arrangements face right; the caller mirrors half of the finished pictures. The layout (shift, ground height,
distractors) comes from the scene's own random stream, so positions reveal nothing about the action.
"""

import math
import random

from scene_figures import COLOURS, INK, LINE, Figure, Pen, shade

STAND = ((0.05, 0.03), (-0.06, 0.03))
STRIDE = ((0.15, 0.03), (-0.15, 0.04))
RUN = ((0.2, 0.07), (-0.3, 0.2))
CART, CART_DARK, ROPE, WOOD = (196, 140, 84), (140, 92, 50), (240, 224, 180), (150, 104, 62)
WATER = (70, 170, 245)
BALL = (250, 250, 250)


def hanging(figure: Figure):
    """Arms at rest, slightly in front."""
    return figure.reach(0.1, -0.27), figure.reach(-0.07, -0.28)


def speed_lines(pen: Pen, x: float, y: float, length=9.0, rows=3, gap=6.0):
    """Draws strokes behind something that moves to the right. x is their right end."""
    for row in range(rows):
        shift = (row % 2) * 3
        pen.line([(x - length - shift, y + row * gap), (x - shift, y + row * gap)], 1.3, (255, 255, 255), 0.5)


def ball(pen: Pen, x: float, y: float, radius=4.2):
    """Draws a white ball with dark patches."""
    pen.disc((x, y), radius, BALL, LINE)
    pen.disc((x, y), radius * 0.36, INK)
    for k in range(5):
        a = k * 2 * math.pi / 5 + 0.3
        pen.disc((x + radius * 0.78 * math.cos(a), y + radius * 0.78 * math.sin(a)), radius * 0.2, INK)


def cart(pen: Pen, x: float, y: float, back: bool):
    """Draws the near side of a cart, or with `back` its far wall (before the passenger is drawn). x is its middle."""
    if back:
        pen.polygon([(x - 14, y - 17), (x + 14, y - 17), (x + 12, y - 6), (x - 12, y - 6)], CART_DARK, LINE)
        return
    pen.polygon([(x - 14, y - 15), (x + 14, y - 15), (x + 11, y - 5), (x - 11, y - 5)], CART, LINE)
    for wheel in (x - 7.5, x + 7.5):
        pen.disc((wheel, y - 2.5), 4.2, (90, 92, 104), LINE)
        pen.disc((wheel, y - 2.5), 1.4, (220, 220, 225))


def passenger(pen: Pen, actor, x: float, y: float):
    """Draws an actor who sits in a cart and faces forward."""
    figure = Figure(actor, x - 2, y - 9, hip=0.10)
    figure.draw(pen, (figure.reach(0.16, -0.16), figure.reach(0.12, -0.16)), ((0.2, 0.1), (0.2, 0.12)))


# --- actions with two actors: a acts on b ----------------------------------------------------------------------------


def chase(pen, a, b, x, y, rng):
    hunter, prey = Figure(a, x - 19, y, lean=0.4), Figure(b, x + 23, y, lean=0.3)
    speed_lines(pen, x - 33, y - 22)
    speed_lines(pen, x + 11, y - 7, 6, 1)
    prey.draw(pen, (prey.reach(0.18, 0.28), prey.reach(-0.2, 0.26)), RUN, "open")
    hunter.draw(pen, (hunter.reach(0.34, 0.02), hunter.reach(0.33, 0.08)), RUN)


def carry(pen, a, b, x, y, rng):
    porter = Figure(a, x + 2, y, lean=0.32)
    sx, sy = porter.at(-0.15, 0.56)
    rider = Figure(b, sx, sy, lean=0.25, hip=0.0)
    rider.draw(pen, (porter.at(0.14, 0.60), porter.at(0.12, 0.64)), ((0.2, -0.06), (0.22, -0.02)))
    porter.draw(pen, (rider.at(0.12, -0.05), rider.at(0.12, -0.02)), STRIDE)


def lift(pen, a, b, x, y, rng):
    lifter = Figure(a, x, y)
    load = Figure(b, 0, 0, angle=math.pi / 2)
    load.x, load.y = x - 0.14 * load.height, lifter.at(0, 1.0)[1] - 0.1 * load.height - 2 + load.hip * load.height
    load.draw(pen, (load.reach(0.16, 0.28), load.reach(0.1, 0.3)), ((0.1, 0.0), (-0.05, 0.04)), "open")
    lifter.draw(pen, (lifter.at(0.17, 1.0), lifter.at(-0.17, 1.0)), ((0.12, 0.03), (-0.12, 0.03)))


def push(pen, a, b, x, y, rng):
    pusher, middle = Figure(a, x - 24, y, lean=0.5), x + 16
    speed_lines(pen, x - 36, y - 20)
    cart(pen, middle, y, back=True)
    passenger(pen, b, middle, y)
    cart(pen, middle, y, back=False)
    handle = (x - 7, y - 21)
    pen.line([(middle - 12, y - 13), handle], 2, CART_DARK, LINE)
    pusher.draw(pen, (handle, (handle[0] - 1, handle[1] + 2)), ((0.1, 0.03), (-0.28, 0.03)))


def pull(pen, a, b, x, y, rng):
    puller, middle = Figure(a, x + 27, y, lean=0.45), x - 18
    speed_lines(pen, x - 35, y - 20)
    cart(pen, middle, y, back=True)
    passenger(pen, b, middle, y)
    cart(pen, middle, y, back=False)
    grip = puller.reach(-0.08, -0.14)
    pen.line([(middle + 13, y - 10), grip, puller.reach(0.04, 0.02)], 1.2, ROPE, 0.7)
    puller.draw(pen, (puller.reach(0.12, -0.06), grip), ((0.14, 0.03), (-0.26, 0.04)))


def kick(pen, a, b, x, y, rng):
    kicker, keeper = Figure(a, x - 27, y, lean=-0.25), Figure(b, x + 30, y, facing=-1, lean=0.15)
    keeper.draw(pen, (keeper.reach(0.2, -0.1), keeper.reach(0.24, 0.06)), ((0.16, 0.03), (-0.16, 0.03)))
    kicker.draw(pen, (kicker.reach(-0.28, -0.1), kicker.reach(0.25, 0.0)), ((0.36, 0.26), (-0.06, 0.03)))
    bx, by = x + 4, y - 13
    speed_lines(pen, bx - 6, by - 3, 6, 3, 3.5)
    ball(pen, bx, by)


def throw(pen, a, b, x, y, rng):
    thrower, catcher = Figure(a, x - 30, y, lean=0.15), Figure(b, x + 30, y, facing=-1, lean=-0.1)
    catcher.draw(pen, (catcher.reach(0.2, 0.26), catcher.reach(0.08, 0.32)), STAND, "open")
    thrower.draw(pen, (thrower.reach(0.26, 0.2), thrower.reach(-0.22, -0.14)), ((0.14, 0.03), (-0.2, 0.05)))
    start = thrower.reach(0.32, 0.3)
    bx, by = x + 5, min(start[1], y - 45) - 3
    for k in range(3):
        t = k / 3
        tx, ty = start[0] + (bx - 5 - start[0]) * t, start[1] + (by - start[1]) * t - 4 * math.sin(t * 3)
        pen.disc((tx, ty), 1.1, (255, 255, 255), 0.5)
    ball(pen, bx, by)


def hug(pen, a, b, x, y, rng):
    gap = (Figure(a, 0, 0).height + Figure(b, 0, 0).height) * 0.085
    left, right = Figure(a, x - gap - 1, y, lean=0.12), Figure(b, x + gap + 1, y, facing=-1, lean=0.12)
    right.draw(pen, (left.at(-0.04, 0.5), left.at(-0.04, 0.56)), STAND)
    left.draw(pen, (right.at(-0.06, 0.52), right.at(-0.06, 0.6)), STAND)
    top = min(left.at(0, 1.0)[1], right.at(0, 1.0)[1]) - 12
    for hx, hy, r in ((x, top, 2.6), (x + 11, top + 5, 1.7)):
        for outline, paint in ((LINE, INK), (0, (232, 50, 80))):
            r2 = r + outline
            pen.disc((hx - r, hy), r2, paint)
            pen.disc((hx + r, hy), r2, paint)
            half = r * 1.9 + outline
            pen.polygon([(hx - half, hy + r * 0.4), (hx + half, hy + r * 0.4), (hx, hy + r * 2.6 + outline)], paint)


def feed(pen, a, b, x, y, rng):
    eater = Figure(b, x + 20, y, facing=-1, hip=0.26)
    seat = y - eater.hip * eater.height + 3
    pen.polygon([(x + 13, seat), (x + 28, seat), (x + 28, y), (x + 13, y)], WOOD, LINE)
    eater.draw(pen, (eater.reach(0.08, -0.26), eater.reach(0.1, -0.24)), ((0.22, 0.03), (0.18, 0.04)), "open")
    mouth = eater.mouth
    server = Figure(a, x - 17, y, lean=0.2)
    shoulder = server.at(*server.shoulder)
    # A long spoon keeps the hand within the arm's reach for any two heights.
    away = math.hypot(mouth[0] - shoulder[0], mouth[1] - shoulder[1])
    t = min(0.30 * server.height, away - 9) / away
    hand = (shoulder[0] + (mouth[0] - shoulder[0]) * t, shoulder[1] + (mouth[1] - shoulder[1]) * t)
    bowl = server.reach(0.22, -0.2)
    server.draw(pen, (hand, bowl), STAND)
    pen.line([hand, (mouth[0] - 2, mouth[1])], 1.1, (226, 228, 234), 0.6)
    pen.disc((mouth[0] - 2, mouth[1]), 2.2, (250, 214, 120), 0.6, 0.8)
    bx, by = bowl[0] + 3, bowl[1]
    pen.polygon([(bx - 6, by - 1), (bx + 6, by - 1), (bx + 3.5, by + 5), (bx - 3.5, by + 5)], (240, 240, 244), LINE)
    pen.disc((bx, by - 1), 5, (250, 180, 70), 0.5, 0.4)


def photograph(pen, a, b, x, y, rng):
    photographer, model = Figure(a, x - 24, y, lean=0.08), Figure(b, x + 26, y, facing=-1)
    model.draw(pen, (model.reach(0.2, 0.24), model.reach(-0.22, 0.22)), ((0.1, 0.03), (-0.1, 0.03)))
    eye = photographer.at(photographer.head[0] + 0.25, photographer.head[1] - 0.0)
    photographer.draw(pen, (photographer.reach(0.22, 0.06), photographer.reach(0.24, 0.08)), STAND)
    cx, cy = eye
    pen.polygon([(cx - 5, cy - 4), (cx + 5, cy - 4), (cx + 5, cy + 4), (cx - 5, cy + 4)], (60, 62, 74), LINE)
    pen.disc((cx + 6, cy), 2.8, (150, 200, 240), LINE)
    fx, fy = cx + 11, cy - 7
    for k in range(8):
        angle = k * math.pi / 4
        pen.line([(fx, fy), (fx + 6 * math.cos(angle), fy + 6 * math.sin(angle))], 1.0, (255, 236, 90), 0.4)
    pen.disc((fx, fy), 2.6, (255, 250, 200))


def spray(pen, a, b, x, y, rng):
    gunner, victim = Figure(a, x - 27, y, lean=0.05), Figure(b, x + 27, y, facing=-1, lean=-0.2)
    victim.draw(pen, (victim.reach(0.22, 0.1), victim.reach(0.2, 0.2)), ((0.08, 0.03), (-0.16, 0.03)), "open")
    nozzle = gunner.reach(0.3, -0.08)
    pen.line([(x - 46, y - 1), (x - 34, y + 2), gunner.at(0.14, 0.1), nozzle], 1.8, (60, 130, 70), LINE)
    gunner.draw(pen, (nozzle, gunner.reach(0.24, -0.14)), ((0.1, 0.03), (-0.14, 0.03)))
    target = victim.at(0.04, 0.72)
    pen.line([nozzle, (nozzle[0] + 5, nozzle[1] - 1)], 2.4, (90, 90, 100), LINE)
    jet = []
    for k in range(7):
        t = k / 6
        rise = 7 * math.sin(math.pi * t)
        jet.append(
            (nozzle[0] + 6 + (target[0] - nozzle[0] - 8) * t, nozzle[1] - 1 + (target[1] - nozzle[1]) * t - rise)
        )
    pen.line(jet, 2.6, WATER, 0.6)
    for k in range(7):
        angle = 0.9 * k + rng.random()
        pen.disc((target[0] + 8 * math.cos(angle), target[1] + 8 * math.sin(angle)), 1.5, WATER, 0.5)


def bow(pen, a, b, x, y, rng):
    humble, proud = Figure(a, x - 26, y, lean=1.1), Figure(b, x + 24, y, facing=-1)
    proud.draw(pen, (proud.reach(0.06, -0.16), proud.reach(-0.1, 0.3)), STAND)
    humble.draw(pen, (humble.at(0.12, 0.3), humble.at(-0.14, 0.72)), ((0.1, 0.03), (-0.08, 0.03)))


def net(pen, a, b, x, y, rng):
    catcher, prey = Figure(a, x - 25, y, lean=0.25), Figure(b, x + 22, y, lean=0.15)
    prey.draw(pen, (prey.reach(0.28, 0.05), prey.reach(0.2, -0.1)), ((0.16, 0.05), (-0.2, 0.08)), "open")
    top = prey.at(*prey.head)
    r = 0.27 * prey.height + 1
    hoop_y = top[1] + r * 0.9
    sack = [(top[0] + r * math.cos(t), hoop_y - 2.1 * r * math.sin(t)) for t in [k * math.pi / 10 for k in range(11)]]
    for k in range(1, 10, 2):  # the mesh, which is transparent
        pen.line([sack[k], (top[0] + r * math.cos(k * math.pi / 10), hoop_y)], 0.5, (250, 250, 250))
    for f in (0.35, 0.7, 0.95):
        half = r * math.sqrt(1 - f * f)
        pen.line([(top[0] - half, hoop_y - 2.1 * r * f), (top[0] + half, hoop_y - 2.1 * r * f)], 0.5, (250, 250, 250))
    pen.line(sack, 0.9, (250, 250, 250), 0.4)
    pen.line([(top[0] - r, hoop_y), (top[0] + r, hoop_y)], 1.8, WOOD, LINE)
    grip = catcher.reach(0.3, 0.12)
    pen.line([catcher.reach(0.12, -0.05), (top[0] - r, hoop_y)], 1.6, WOOD, LINE)
    catcher.draw(pen, (catcher.reach(0.14, -0.05), grip), ((0.16, 0.03), (-0.2, 0.05)))


def shelter(pen, a, b, x, y, rng):
    holder, guest = Figure(a, x - 17, y, lean=0.1), Figure(b, x + 14, y, facing=1)
    for _ in range(22):
        rx, ry = rng.random() * 100, rng.random() * 60
        pen.line([(rx, ry), (rx - 1.5, ry + 5)], 0.8, (110, 160, 225))
    guest.draw(pen, hanging(guest), STAND)
    top = guest.at(0, 1.12)[1] - 12 - (12 if guest.actor.kind in ("rabbit", "wizard") else 0) * guest.height / 48
    mid = x + 15
    hand = holder.reach(0.3, 0.04)
    pen.line([hand, (mid - 10, top + 4), (mid, top)], 1.3, WOOD, 0.7)
    dome = [(mid + 21 * math.cos(t), top + 9 - 14 * math.sin(t)) for t in [k * math.pi / 10 for k in range(11)]]
    pen.polygon(dome, (70, 76, 110), LINE)
    for k in (3, 5, 7):
        pen.line([dome[k], (mid + (k - 5) * -5, top + 9)], 0.6, (150, 156, 190))
    holder.draw(pen, (hand, holder.reach(-0.05, -0.28)), STAND)


# --- actions of one actor --------------------------------------------------------------------------------------------


def jump(pen, a, x, y, facing):
    pen.disc((x, y), 9, (70, 70, 70), 0, 0.22)
    figure = Figure(a, x, y - 15, facing)
    for dx in (-7, 0, 7):
        pen.line([(x + dx, y - 8), (x + dx, y - 4)], 1.0, (255, 255, 255), 0.5)
    figure.draw(pen, (figure.reach(0.2, 0.26), figure.reach(-0.2, 0.26)), ((0.2, 0.2), (-0.2, 0.16)), "open")


def sleep(pen, a, x, y, facing):
    figure = Figure(a, 0, 0, facing, angle=-math.pi / 2)
    half = 0.52 * figure.height
    x = min(max(x, half + 3), 97 - half)
    figure.x = x + facing * 0.13 * figure.height
    figure.y = y - 5 + figure.hip * figure.height
    mat = [(x - half, y + 3), (x + half, y + 3), (x + half - 2, y - 1), (x - half + 2, y - 1)]
    pen.polygon(mat, (230, 226, 240), LINE)
    figure.draw(pen, (figure.reach(0.12, -0.26), figure.reach(0.02, -0.28)), ((0.03, 0.0), (-0.02, 0.0)), "asleep")
    zx, zy = figure.at(0.3, 0.8)
    for k, size in enumerate((3.0, 4.2)):
        ox, oy = zx + k * 4, zy - 4 - k * 7
        pen.line([(ox, oy), (ox + size, oy), (ox, oy + size), (ox + size, oy + size)], 1.0, (255, 255, 255), 0.6)


def sit(pen, a, x, y, facing):
    figure = Figure(a, x, y, facing, hip=0.26)
    seat = y - 0.26 * figure.height + 3
    pen.line([(x - facing * 8, seat - 14), (x - facing * 8, seat)], 2.4, WOOD, LINE)
    pen.polygon([(x - 8, seat), (x + 8, seat), (x + 8, seat + 3), (x - 8, seat + 3)], WOOD, LINE)
    for leg in (-7, 7):
        pen.line([(x + leg, seat + 3), (x + leg, y)], 1.6, WOOD, 0.6)
    figure.draw(pen, (figure.reach(0.2, -0.2), figure.reach(0.16, -0.2)), ((0.24, 0.03), (0.2, 0.05)))


def read(pen, a, x, y, facing):
    figure = Figure(a, x, y, facing, lean=0.08)
    grip = figure.reach(0.24, -0.08)
    figure.draw(pen, (grip, (grip[0], grip[1] - 1)), STAND)
    bx, by = grip[0] + facing * 1.5, grip[1] - 3
    pen.polygon([(bx, by + 4), (bx - 7, by + 2), (bx - 7, by - 6), (bx, by - 4)], (250, 246, 232), LINE)
    pen.polygon([(bx, by + 4), (bx + 7, by + 2), (bx + 7, by - 6), (bx, by - 4)], (250, 246, 232), LINE)
    for side in (-1, 1):
        for row in (-2.6, 0.2):
            pen.line([(bx + side * 1.5, by + row), (bx + side * 5.4, by + row - 0.9)], 0.5, (120, 120, 130))


def wave(pen, a, x, y, facing):
    figure = Figure(a, x, y, facing)
    hand = figure.reach(0.22, 0.24)
    figure.draw(pen, (hand, figure.reach(-0.08, -0.27)), STAND)
    for r in (4.5, 7.5):
        arc = [(hand[0] + facing * r * math.cos(t), hand[1] - r * math.sin(t)) for t in (-0.5, 0.0, 0.5, 1.0)]
        pen.line(arc, 0.9, (255, 255, 255), 0.5)


_PAIR = (chase, carry, lift, push, pull, kick, throw, hug, feed, photograph, spray, bow, net, shelter)
PAIR = {arrangement.__name__: arrangement for arrangement in _PAIR}
SOLO = {arrangement.__name__: arrangement for arrangement in (jump, sleep, sit, read, wave)}


# --- backdrops -------------------------------------------------------------------------------------------------------

PLACES = {  # sky, ground
    "meadow": ((178, 222, 246), (142, 196, 108)),
    "beach": ((166, 216, 244), (238, 216, 160)),
    "snow": ((196, 212, 230), (236, 240, 246)),
    "desert": ((250, 220, 176), (222, 172, 110)),
    "street": ((206, 210, 220), (158, 160, 168)),
    "room": ((240, 226, 204), (186, 142, 104)),
    "night": ((44, 52, 92), (62, 92, 82)),
}


def _tree(pen, x, y, size, place):
    if place == "desert":
        arm = [(x, y - size), (x + size * 0.8, y - size), (x + size * 0.8, y - size * 1.6)]
        for points in ([(x, y), (x, y - size * 2.2)], arm):
            pen.line(points, size * 0.4, (92, 150, 92), 0.6)
        return
    pen.line([(x, y), (x, y - size)], size * 0.35, (120, 84, 54), 0.6)
    leaves = {"snow": (226, 236, 240), "night": (38, 84, 66)}.get(place, (88, 158, 84))
    for dx, dy, r in ((-0.5, 1.3, 0.7), (0.5, 1.3, 0.7), (0, 1.9, 0.8)):
        pen.disc((x + dx * size, y - dy * size), r * size, leaves, 0.6)
    pen.disc((x, y - 1.4 * size), 0.6 * size, leaves)


def backdrop(pen: Pen, place: str, horizon: float, rng: random.Random):
    """Draws the ground, the background, and distractors that take part in no action."""
    ground = PLACES[place][1]
    pen.polygon([(0, horizon), (100, horizon), (100, 100), (0, 100)], ground)

    def far():
        return 6 + rng.random() * 88

    if place in ("meadow", "night"):
        pen.disc((far(), horizon + 24), 34, shade(ground, 0.92))
        pen.polygon([(0, horizon + 1), (100, horizon + 1), (100, 100), (0, 100)], ground)
    if place == "beach":
        pen.polygon([(0, horizon - 9), (100, horizon - 9), (100, horizon), (0, horizon)], (92, 168, 214))
    if place == "street":
        for k in range(4):
            top = horizon - 18 - rng.random() * 26
            wall = shade((176, 150, 146), 0.85 + 0.3 * rng.random())
            pen.polygon([(k * 25, horizon), (k * 25, top), (k * 25 + 25, top), (k * 25 + 25, horizon)], wall)
            for row in range(3):
                for column in range(3):
                    wx, wy = k * 25 + 4 + column * 7, top + 4 + row * 8
                    if wy + 5 < horizon:
                        pen.polygon([(wx, wy), (wx + 4, wy), (wx + 4, wy + 5), (wx, wy + 5)], (214, 222, 230))
    if place == "room":
        wx = far()
        pen.polygon([(wx - 9, 10), (wx + 9, 10), (wx + 9, 30), (wx - 9, 30)], (186, 222, 242), LINE)
        pen.line([(wx, 10), (wx, 30)], 0.9, (250, 250, 250))
        pen.line([(0, horizon), (100, horizon)], 1.4, (150, 110, 80))
    elif place == "night":
        for _ in range(8):
            pen.disc((rng.random() * 100, rng.random() * horizon * 0.8), 0.7, (250, 246, 210))
        pen.disc((far(), 13), 6, (248, 240, 200))
    elif place == "snow":
        for _ in range(14):
            pen.disc((rng.random() * 100, rng.random() * 100), 0.9, (255, 255, 255))
    else:
        if rng.random() < 0.5:
            pen.disc((far(), 13), 7, (255, 226, 110))
        for _ in range(int(rng.random() * 3)):
            cx, cy = far(), 8 + rng.random() * 18
            for dx, r in ((-5, 3), (0, 4.4), (5, 3)):
                pen.disc((cx + dx, cy), r, (250, 252, 254))
    if place not in ("room", "street", "beach"):
        for _ in range(int(rng.random() * 3)):
            _tree(pen, far(), horizon + 2, 6 + rng.random() * 4, place)
    # Distractors: a ball, an empty cart, a closed umbrella, flowers, stones.
    for _ in range(int(rng.random() * 3)):
        thing, tx, ty = int(rng.random() * 5), far(), horizon + 1 + rng.random() * 4
        if thing == 0:
            ball(pen, tx, ty - 3, 3.4)
        elif thing == 1:
            cart(pen, tx, ty, back=False)
        elif thing == 2:
            pen.line([(tx, ty), (tx + 6, ty - 14)], 2.2, (70, 76, 110), 0.6)
            pen.line([(tx + 6, ty - 14), (tx + 7, ty - 17)], 0.9, WOOD, 0.4)
        elif thing == 3:
            petals = list(COLOURS.values())[int(rng.random() * len(COLOURS))]
            pen.line([(tx, ty), (tx, ty - 6)], 0.8, (60, 130, 60))
            for k in range(5):
                pen.disc((tx + 1.8 * math.cos(k * 1.26), ty - 7 + 1.8 * math.sin(k * 1.26)), 1.3, petals, 0.3)
            pen.disc((tx, ty - 7), 1.1, (255, 230, 120))
        else:
            pen.disc((tx, ty - 1), 4, (150, 150, 156), 0.7, 0.6)
