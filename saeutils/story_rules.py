"""The rules of the story grammar. Data only; `grammar` says how they are read.

    [Rule] or [Rule:A,B]   one of the rule's templates; A and B are called X and Y in it.
                           A rule with a capital is a whole sentence or more.
    {A} {B} {O} {P}        hero, friend, thing that matters, elder of the hero
    {A.he} him his self    a pronoun for the hero; {A.I} me my you your in dialogue
    {G.they} them their    hero and friend together
    {noun:animal}          a word of that concept; also nouns, adj, adv, past, base, ing,
                           s (verbs), other; {x=noun:food} keeps it as {x}
Everything else is text. `a` becomes `an` where it must.
"""

PLOTS = {
    "lost thing": """[Open]¶[Want]¶[Lose] [Sad:A] [Search] [Aside]¶[Ask]¶[Find] [Glad]
        [End]""",
    "quarrel": "[Open]¶[Meet] [Game]¶[Quarrel] [Cross]¶[Scold]¶[Sorry] [Glad] [End]",
    "animal in need": "[Open]¶[Walk] [Rescue]¶[Ask] [Heal]¶[Glad] [End]",
    "trip": "[Open]¶[Trip] [Aside] [Walk]¶[Meet] [Game] [Aside]¶[Home] [End]",
    "cooking": "[Open]¶[Cook] [Mistake]¶[Scold] [Sad:A] [Again]¶[Eat] [End]",
    "fear": "[Open]¶[Night] [Afraid]¶[Comfort]¶[Brave] [Glad] [End]",
    "birthday": "[Open]¶[Party] [Gift]¶[Meet] [Game] [Eat]¶[Glad] [End]",
    "making": "[Open]¶[Idea] [Make] [Mistake]¶[Meet] [Help]¶[Show] [Glad] [End]",
}

RULES = {
    "Open": """
        Once upon a time, there was a {adj:size} {A.kind} named {A}. [Likes:A] [Aside]
        There once was a {adj:virtue} {A.kind} named {A} who lived in a {adj:colour} house near the {noun:outdoor place}. [Likes:A]
        Once there was a {A.kind}. {A.his} name was {A}. [Likes:A] [Aside]
        One {other:season} {other:time of day}, a {adj:virtue} {A.kind} named {A} woke up in a {noun:indoor place}. [Weather]
        In a {adj:quality} village there lived a {A.kind} named {A}. [Likes:A]
        {A} was a {adj:size} {A.kind} with {adj:colour} {nouns:clothing}. [Likes:A] [Aside]""",
    "Likes": """
        {X.he} loved to {base:play} with {X.his} {nouns:toy}.
        {X.he} liked {nouns:food} more than {nouns:food}, but {X.he} never ate {nouns:food}.
        Every {other:time of day} {X.he} {past:motion} to the {noun:outdoor place}, because {X.he} wanted to see the {nouns:animal}.
        {X.he} had {other:number} {nouns:animal} and a {adj:texture} {noun:clothing}.
        {X.he} wanted to be a {noun:person} when {X.he} grew up.
        {X.he} was always {adj:joy} when there was {noun:drink} and {adj:taste} {noun:food}.""",
    "Weather": """
        The {noun:weather} had stopped and the air was {adj:temperature}.
        It was a {adj:temperature} {other:day} and everybody talked about the {noun:weather}.
        Outside there was {noun:weather}, and the {nouns:nature} were {adj:texture}.
        The sky was {adj:colour}, so {A} took {A.his} {noun:clothing}.""",
    "Aside": """
        [Agree] [Weather]
        [Agree]
        [Agree] [Agree]
        [Crowd]
        [Weather]""",
    "Agree": """
        The {nouns:toy} near the {noun:vehicle} were {adj:colour}.
        The {noun:toy} beside the {nouns:vehicle} was {adj:colour}.
        The {noun:animal} behind the {nouns:nature} was {adj:size}, but the {nouns:animal} in the {noun:indoor place} were {adj:size}.
        The {nouns:tool} on the {noun:tool} were {adj:quality} and the {noun:clothing} was {adj:quality}.
        There was a {adj:colour} {noun:vehicle} and there were {other:number} {adj:colour} {nouns:vehicle}.
        There were many {nouns:nature} under the {noun:nature}, and each was as {adj:texture} as {other:material}.
        The {nouns:person} from the {noun:outdoor place} were {adj:virtue}, although the {noun:person} was {adj:vice}.
        Both {nouns:tool} were made of {other:material}.""",
    "Crowd": """
        A {noun:person} and {other:number} {nouns:animal} {past:motion} {adv:speed} across the {noun:outdoor place}.
        In the {noun:indoor place} a {noun:person} {past:making} a {adj:quality} {noun:toy} for the {nouns:person}.
        Some {nouns:animal} {past:motion} around while a {noun:person} {past:play}.
        The {noun:person} who lived near the {noun:outdoor place} had a {adj:size} {noun:vehicle} full of {nouns:food}.""",
    "Want": """
        One {other:day}, {A} got a {adj:quality} {O} from {A.his} {P}. {O.it} was {adj:colour} and {adj:texture}. {A} carried {O.it} everywhere.
        {A.his} favorite thing was a {adj:colour} {O}. {A} kept {O.it} in a {noun:tool} beside the {noun:tool}.
        {A} had a {adj:quality} {O} that {A.his} {P} had made. {A.he} {past:care} {O.it} every {other:time of day}.""",
    "Lose": """
        But one {other:day} the {O} was gone. {A} could not see {O.it} in the {noun:indoor place}.
        Then, while {A} {past:motion} through the {noun:outdoor place}, {A.he} lost the {O}.
        "Where is {A.my} {O}?" {A.he} {past:speech}. {O.it} was not in the {noun:tool} and not under the {noun:tool}.
        A {adj:vice} {noun:animal} {past:conflict} the {O} and {past:motion} away with {O.it}.""",
    "Sad": """
        {X} was {adj:sadness}. A tear ran down {X.his} {noun:body part}.
        {X} felt {adj:sadness} and {adj:fear}, so {X.he} {past:speech} {adv:sad manner}.
        "{X.I} am so {adj:sadness}," {X} {past:speech} {adv:sad manner}.
        {X} sat down on a {noun:nature} because {X.he} was too {adj:sadness} to {base:play}.""",
    "Search": """
        {A} looked under the {nouns:nature} and behind the {noun:indoor place}, but {A.he} only {past:perception} {other:number} {nouns:toy}.
        First {A.he} {past:motion} to the {noun:outdoor place}. Then {A.he} {past:motion} to the {noun:indoor place}. The {O} was not there.
        {A} {past:thought} that a {noun:person} might know, so {A.he} {past:motion} to the {noun:indoor place}.
        {A} searched until {other:time of day}. {A.his} {nouns:body part} were {adj:temperature}, but {A.he} did not stop.""",
    "Ask": """
        {A} {past:motion} to {A.his} {P}. "Can {P.you} {base:care} {A.me}?" {A.he} {past:speech}. "Of course {P.I} can," {A.his} {P} {past:speech} {adv:speed}.
        {A} met {B}, who was a {adj:virtue} {B.kind}. "{A.I} need {B.your} help," {A} {past:speech}. {B} {past:thought} for a while. "{B.I} will {base:care} {A.you}," {B.he} {past:speech}.
        "What should {A.I} do?" {A} asked {B}, the {B.kind} from the {noun:indoor place}. {B} told {A.him} that a {noun:person} always {s:thought} about such things.""",
    "Find": """
        At last {A} {past:perception} something {adj:colour} behind a {noun:nature}. It was the {O}! {O.it} was a bit {adj:texture}, but {O.it} was not broken.
        Suddenly there was a {other:sound} in the {noun:outdoor place}. {A} looked up and {past:perception} the {O}. A {noun:animal} had kept {O.it} in the {noun:nature}.
        The {noun:person} had found the {O} near the {noun:outdoor place} and gave {O.it} back to {A.him}.""",
    "Meet": """
        There {A} met {B}, a {adj:size} {B.kind} with a {adj:colour} {noun:clothing}. "Hello!" {B} {past:speech}. [Talk:B,A]
        {B} came, too. {B.he} was a {B.kind} and the best friend of {A}. [Talk:A,B]
        A {B.kind} named {B} {past:motion} along. {B.he} had a {noun:toy} in {B.his} {noun:body part}. [Talk:B,A] [Talk:A,B]""",
    "Talk": """
        "{X.I} have {other:number} {nouns:toy}," {X} {past:speech}. "{Y.you} may play with the {adj:colour} ones."
        "Do {Y.you} like {nouns:food}?" {X} {past:speech}. "{Y.I} like {nouns:food}, but {Y.my} {noun:family} {s:thought} that {nouns:food} are better," {Y} {past:speech}.
        "{X.my} {noun:family} {s:making} {nouns:tool} and {X.my} {nouns:family} {base:making} {nouns:clothing}," {X} {past:speech} {adv:joyful manner}.
        "Why are {Y.you} so {adj:emotion}?" {X} {past:speech}. "Because {Y.I} {past:perception} a {noun:animal} in the {noun:indoor place}," {Y} {past:speech}.
        "{X.I} do not know what to do," {X} {past:speech}. {Y} {past:thought} that {X} was {adj:emotion}, and {past:care} {X.him}.""",
    "Game": """
        {G.they} {past:motion} and {past:play} in the {noun:outdoor place} all day long.
        {A} and {B} played with the {nouns:toy}. {G.they} were {adj:joy}, and {G.their} {nouns:clothing} were {adj:texture}.
        {G.they} pretended that {A} was a {noun:person} and {B} was a {noun:person}. A {noun:nature} was {G.their} {noun:vehicle}.
        {A} {past:motion}, and {B} {past:motion} after {A.him}. {G.they} could not stop laughing.""",
    "Quarrel": """
        Then {A} {past:conflict} the {O}. "{O.it} is {A.mine}!" {A} {past:speech} {adv:angry manner}. "No, {O.it} is {B.mine}!" {B} {past:speech}.
        {B} wanted the {O}, but {A} was {adj:vice} and did not let {B.him} have {O.it}. "{A.you} are so {adj:vice}!" {B} {past:speech}.
        {A} was {adj:vice} and {past:conflict} {B.him}, because {B.he} had broken the {O}.""",
    "Cross": """
        {B} was {adj:anger} and {past:motion} away. {A} was {adj:anger}, too.
        {G.they} were both {adj:anger}. {A} looked at {B.him} {adv:angry manner}.
        {B} felt {adj:anger} with {A.him}, and nobody {past:play} for a while. [Sad:B]""",
    "Scold": """
        {A.his} {P} {past:perception} what had happened. "{A.you} must not be {adj:vice}," {A.his} {P} {past:speech}.
        "That was not {adj:virtue}," {A.his} {P} {past:speech}. "A {adj:virtue} {A.kind} never {s:conflict} and always {s:care}."
        {A.his} {P} was not {adj:anger}. "If {A.you} are {adj:virtue}, everybody will be {adj:joy}," {A.his} {P} {past:speech}.""",
    "Sorry": """
        "{A.I} am sorry," {A} {past:speech} {adv:sad manner}. {B} {past:thought} about it. "{B.I} forgive {A.you}," {B.he} {past:speech}.
        {A} {past:transfer} {B.him} the {O}, since {A.he} knew that {A.he} had been {adj:vice}.
        {A} gave {B.him} a {adj:taste} {noun:food} and said sorry. {B} {past:care} {A.him}.""",
    "Walk": """
        One {other:time of day}, {A} {past:motion} to the {noun:outdoor place}. {A.he} {past:perception} {other:number} {adj:colour} {nouns:animal} and a {noun:nature}.
        On {other:day}, {A} and {A.his} {P} {past:motion} past the {noun:indoor place}. [Crowd]
        {A} {past:motion} over the {noun:outdoor place} although it was {adj:temperature}. [Agree]""",
    "Rescue": """
        Suddenly {A} heard a {other:sound}. There was a {adj:size} {x=noun:animal} under a {noun:nature}. The {x} had hurt a {noun:body part} and was {adj:fear}.
        Near the {noun:outdoor place} a {x=noun:animal} was stuck in the {other:material}. The {x} {past:speech} {adv:fearful manner}, but nobody {past:perception} the {x} until {A} came.
        A {adj:vice} {noun:animal} chased a {adj:size} {x=noun:animal}. {A} was {adj:fear}, but {A.he} wanted to {base:care} the {x}.""",
    "Heal": """
        {A} took a {adj:texture} {noun:clothing} and {past:care} the {x}. After {other:number} days the {x} was {adj:joy} again.
        {A} gave the {x} some {noun:drink} and a {noun:food}. The {x} {past:motion} and {past:play}.
        With a {noun:tool} and a {noun:tool} {A} {past:care} the {x}. "Do not be {adj:fear}," {A.he} {past:speech}.""",
    "Trip": """
        One {other:day} {A} and {A.his} {P} took the {noun:vehicle} to the {noun:outdoor place}. {A} looked out and {past:perception} {nouns:animal}, {nouns:vehicle} and a {noun:indoor place}.
        In {other:season} {A} went to the {noun:outdoor place} by {noun:vehicle}. {A.his} {P} had packed {nouns:food}, {noun:drink} and a {noun:clothing}.
        "Today {A.we} will go to the {noun:outdoor place}," {A.his} {P} {past:speech}. {A} was {adj:joy} and {adj:surprise}.""",
    "Home": """
        When the {other:time of day} came, {G.they} {past:motion} back to the {noun:vehicle}. {A} was tired, but {A.he} was {adj:joy}.
        "It is late," {A.his} {P} {past:speech}. So {A} {past:motion} home and put the {noun:clothing} into the {noun:tool}.""",
    "Cook": """
        One {other:time of day} {A} wanted to {base:making} a {adj:taste} {noun:food} for {A.his} {P}. {A.he} needed {other:number} {nouns:food}, {noun:drink} and a {noun:tool}.
        {A.his} {P} {past:speech}, "Let us make {nouns:food}!" {A} got the {noun:tool} and washed {A.his} {nouns:body part}. [Agree]""",
    "Mistake": """
        But {A} was {adj:vice} and dropped the {noun:tool}. {other:sound}! The {nouns:tool} were full of {other:material}.
        Then {A} forgot the {noun:tool} near the {noun:tool}, and a {noun:toy} fell down. {other:sound}! {A} was {adj:surprise}.
        {A} did not {base:perception} the {noun:animal} that {past:motion} over the {nouns:food}.""",
    "Again": """
        "Try again," {A.his} {P} {past:speech}. This time {A} was {adj:virtue} and {past:making} {adv:speed}.
        So {A} took a {adj:quality} {noun:tool} and {past:making} {other:number} {nouns:food}. {A.his} {P} {past:care} {A.him}.""",
    "Eat": """
        {A} ate a {adj:taste} {noun:food} and {other:number} {adj:taste} {nouns:food}. The {nouns:food} were {adj:temperature}, but the {noun:drink} was {adj:temperature}.
        Everyone got {nouns:food} with {noun:drink}. "This {noun:food} is {adj:taste}," {A} {past:speech}. "These {nouns:food} are {adj:taste}, too."
        There were {nouns:food}, {nouns:food} and a {adj:size} {noun:food}. {A} liked the {adj:taste} ones.""",
    "Night": """
        One {other:time of day} there was {noun:weather} outside. {other:sound}! {A} {past:perception} a {adj:size} shadow in the {noun:indoor place}.
        It was dark. {A} lay under a {adj:texture} blanket and {past:perception} a {other:sound} near the {noun:tool}.
        {A} dreamed of a {adj:size} {noun:animal} with {adj:colour} {nouns:body part}. The {noun:animal} {past:motion} after {A.him}.""",
    "Afraid": """
        {A} was {adj:fear}. {A.his} {nouns:body part} were {adj:temperature}. "Who is there?" {A.he} {past:speech} {adv:fearful manner}.
        {A} felt {adj:fear} and hid behind a {noun:tool}. Nobody answered.
        "{A.I} am {adj:fear}," {A} {past:speech}, while {A.he} {past:motion} to {A.his} {P}.""",
    "Comfort": """
        {A.his} {P} {past:care} {A.him}. "Do not be {adj:fear}," {A.his} {P} {past:speech}. "That was only a {noun:animal} in the {noun:indoor place}."
        {B}, who was a {adj:virtue} {B.kind}, heard {A.him} and came. "{B.I} was {adj:fear} before, too," {B.he} {past:speech}. "But {noun:weather} cannot hurt {A.you}."
        {A.his} {P} gave {A.him} a {noun:toy} and some {adj:temperature} {noun:drink}. "{A.you} are {adj:virtue}," {A.his} {P} {past:speech}.""",
    "Brave": """
        {A} took a {noun:tool} and {past:motion} to the {noun:indoor place}. There was nothing but a {adj:size} {noun:animal}, and {A.he} laughed at {A.self}.
        Then {A} told {A.self} that {A.he} was {adj:virtue}. {A.he} {past:motion} {adv:speed} through the {noun:outdoor place}, and nothing happened.""",
    "Party": """
        It was the birthday of {A}. {A.he} was {other:number} years old, and {A.his} {P} had made a {adj:taste} {noun:food}. The {nouns:tool} were {adj:colour}.
        On {other:day} {A} had a party in the {noun:indoor place}. {nouns:person} and {nouns:animal} came, and a {noun:person} {past:play}.""",
    "Gift": """
        {A} opened a {adj:colour} box. There was a {O} in the box! "{A.I} always wanted a {O}," {A.he} {past:speech} {adv:joyful manner}. {O.it} was {adj:quality}.
        {A.his} {P} {past:transfer} {A.him} a {O}. {O.it} was made of {other:material}. {A} {past:thought} that {O.it} was {adj:quality}, and {past:care} {A.his} {P}.""",
    "Idea": """
        {A} {past:perception} some {other:material} and a {noun:tool}. "{A.I} will {base:making} a {O}," {A.he} {past:thought}.
        {A} had an idea. {A.he} wanted to {base:making} a {adj:quality} {O} out of {other:material}, since {A.his} {P} had lost one.""",
    "Make": """
        First {A.he} {past:making} the {nouns:nature}. Then {A.he} put the {adj:colour} {other:material} on the {noun:tool}. The {O} grew {adj:size}.
        {A.he} was {ing:making} all day long. {A.his} {noun:family} was {ing:making}, too, and the {nouns:animal} were {ing:motion} around.
        {A} cut the {other:material} with a {noun:tool} and {past:making} a {noun:clothing} for the {O}.""",
    "Help": """
        "{B.I} can hold the {noun:tool} while {A.you} {base:making}," {B} {past:speech}. So {G.they} worked until {other:time of day}.
        {B} {past:transfer} {A.him} a {noun:tool}, which was just what {A.he} needed. {G.they} were {adj:virtue} and did not stop.""",
    "Show": """
        When the {O} was ready, {A} {past:transfer} {O.it} to {A.his} {P}. {O.it} was {adj:quality}, and {A.his} {P} was {adj:surprise}.
        Every {noun:person} in the {noun:outdoor place} came to see the {O}. "Who made {O.it}?" a {noun:person} {past:speech}. "{A.I} made {O.it} {A.myself}," {A} {past:speech} {adv:joyful manner}.""",
    "Glad": """
        {A} was {adj:joy} and {past:motion} around the {noun:indoor place}.
        "{A.I} am so {adj:joy}!" {A} {past:speech} {adv:joyful manner}.
        Everybody was {adj:joy}, and {A} {past:play} {adv:joyful manner}.
        {A} felt {adj:joy}, because {A.he} was not {adj:sadness} any more.""",
    "End": """
        From that day on, {A} was always {adj:virtue}. The end.
        {A} had learned that it is better to be {adj:virtue} than {adj:vice}.
        And {A} {past:play} until {A.he} fell asleep in the {noun:indoor place}.
        After that, {A} never {past:conflict} anybody again and {past:care} every {noun:animal}.""",
}
