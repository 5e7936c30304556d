"""The words of the story grammar, by concept. Data only: `grammar` reads them.

A noun is written singular, with its plural after a slash where -s is wrong. A verb is
base/past/-ing, or the base alone when the regular rules hold.
"""

NAMES = {
    "girl name": """Lily Mia Anna Emma Sara Zoe Lucy Molly Daisy Ruby Ella Grace Nora
        Rose Alice Amy Bella Chloe Clara Eva Fiona Hannah Holly Ivy Jane Julia Kate
        Layla Leah Lena Lola Maria Maya Nina Olivia Penny Poppy Rosie Sally Sophie
        Stella Tina Wendy Violet Betty Carla Dora Elsa Freya Gina Heidi Iris Jenny
        Kitty Luna Martha Nelly Pam Rita Susie""",
    "boy name": """Tom Tim Ben Max Sam Jack Leo Noah Finn Oscar Henry Adam Alex Andy
        Billy Bob Charlie Dan David Eddie Eric Felix Frank Fred George Harry Hugo Ian
        Jake James Joe John Josh Kevin Liam Luke Mark Matt Mike Nick Oliver Owen Paul
        Peter Ralph Rick Robbie Roy Simon Steve Ted Theo Toby Tony Victor Walter Will
        Zach Bruno Carlos""",
}

NOUNS = {
    "animal": """dog cat rabbit mouse/mice bird fox/foxes bear frog duck horse cow pig
        sheep/sheep goat hen chick owl turtle snail squirrel deer/deer lion tiger
        monkey elephant giraffe zebra kangaroo koala panda penguin seal dolphin whale
        fish/fish crab octopus/octopuses bee butterfly/butterflies ant spider ladybug
        beetle caterpillar worm lizard snake crocodile parrot swan goose/geese crow
        robin sparrow pigeon hedgehog beaver otter raccoon skunk mole badger
        wolf/wolves puppy/puppies kitten pony/ponies donkey camel llama hamster
        peacock dragonfly/dragonflies grasshopper cricket moth lamb calf/calves
        piglet duckling cub""",
    "food": """apple banana pear plum grape cherry/cherries strawberry/strawberries
        blueberry/blueberries peach/peaches melon lemon mango/mangoes pineapple
        coconut carrot potato/potatoes tomato/tomatoes cucumber pumpkin onion pea
        bean mushroom cabbage/cabbages radish/radishes cookie cake muffin pie
        pancake waffle donut cupcake biscuit bun sandwich/sandwiches pizza burger
        sausage egg nut walnut almond noodle dumpling meatball pretzel cracker
        candy/candies lollipop brownie tart bagel taco pudding omelet pepper""",
    "toy": """ball doll kite puzzle robot drum balloon marble yoyo puppet block
        whistle crayon sticker rattle dollhouse racket frisbee dice/dice domino/dominoes
        card rocket dinosaur castle swing hoop rope spinner telescope trumpet guitar
        violin flute piano xylophone tambourine teddy mask magnet paintbrush/paintbrushes
        notebook storybook pinwheel slinky lantern snowglobe""",
    "clothing": """hat coat scarf/scarves sock shoe boot mitten glove dress/dresses
        shirt skirt sweater jacket belt cap cape crown necklace bracelet ring ribbon
        button apron raincoat slipper sandal tie vest backpack purse bow costume
        helmet blouse hood watch/watches""",
    "tool": """hammer nail ladder bucket shovel broom mop rake hose wheelbarrow saw
        screwdriver wrench/wrenches brush/brushes needle thread scissor key lock lamp
        candle flashlight camera clock umbrella basket box/boxes bag bottle cup mug
        plate bowl spoon fork pot pan kettle oven fridge towel pillow blanket mirror
        comb sponge soap jar lid tray map compass/compasses radio phone pencil pen
        ruler eraser magnifier""",
    "vehicle": """car truck bus/buses train boat ship plane bike tractor scooter wagon
        sled canoe raft helicopter taxi ambulance tram submarine skateboard tricycle
        carriage van yacht""",
    "outdoor place": """park garden forest beach/beaches lake river meadow hill mountain
        farm playground field pond valley island desert cave jungle yard orchard
        bridge road street harbor waterfall path village town zoo camp cliff swamp
        stream market""",
    "indoor place": """house kitchen bedroom school library/libraries attic basement
        barn shop store museum hospital bakery/bakeries cottage tent palace tower
        classroom bathroom hallway garage theater restaurant station cabin hut gym
        office chapel pantry/pantries closet""",
    "nature": """flower tree leaf/leaves rose tulip daisy/daisies sunflower branch/branches
        stick stone rock pebble shell feather acorn pinecone seed root bush/bushes
        grass/grasses star cloud puddle snowflake rainbow shadow wave nest hive log
        icicle petal berry/berries vine fern clover dandelion""",
    "body part": """hand foot/feet arm leg head nose ear eye mouth tooth/teeth finger
        toe knee elbow shoulder cheek chin neck back tummy/tummies tail paw wing
        beak whisker thumb""",
    "person": """teacher doctor nurse farmer baker pilot painter singer dancer
        firefighter policeman/policemen sailor king queen prince princess/princesses
        knight wizard witch/witches fairy/fairies pirate clown gardener librarian
        chef builder driver neighbor stranger giant elf/elves shepherd fisherman/fishermen
        postman/postmen captain magician tailor juggler""",
    "family": "mom dad grandma grandpa aunt uncle cousin",
    "drink": "milk/milk juice/juice water/water tea/tea lemonade/lemonade cocoa/cocoa",
    "weather": "rain/rain snow/snow wind/wind storm sunshine/sunshine fog/fog thunder/thunder",
}

ADJECTIVES = {
    "colour": """red blue green yellow purple pink brown black white gray golden silver
        violet turquoise scarlet beige crimson""",
    "size": """big small tiny huge little large giant enormous short tall long wide
        narrow thick thin gigantic""",
    "joy": """happy glad cheerful joyful excited proud delighted pleased merry thrilled
        grateful content hopeful""",
    "sadness": """sad unhappy gloomy lonely upset miserable sorry disappointed tearful
        heartbroken homesick""",
    "anger": "angry mad cross furious annoyed grumpy jealous cranky irritated",
    "fear": "scared afraid frightened nervous worried anxious terrified shy alarmed",
    "surprise": "surprised amazed shocked astonished puzzled confused curious stunned",
    "virtue": """kind brave gentle clever honest patient polite helpful friendly wise
        generous careful loyal thoughtful caring obedient""",
    "vice": """rude lazy greedy selfish careless naughty mean bossy stubborn sneaky
        noisy impatient""",
    "quality": """pretty shiny old new special magic strange funny beautiful lovely
        broken dirty clean empty full heavy light strong fancy perfect ordinary
        wonderful sparkly dusty rusty wooden plastic colorful round square striped
        spotted fresh modern ancient secret hidden favorite precious plain""",
    "texture": """soft hard smooth rough fluffy fuzzy sticky wet dry slippery bumpy
        silky sharp furry woolly prickly""",
    "taste": """sweet sour salty bitter spicy juicy delicious yummy tasty crunchy
        creamy crispy buttery""",
    "temperature": "hot cold warm cool icy freezing chilly frosty",
}

VERBS = {
    "motion": """walk run/ran/running jump skip/skipped/skipping hop/hopped/hopping
        climb crawl march dance hurry rush wander race skate swim/swam/swimming
        slide/slid/sliding ride/rode/riding fly/flew/flying roll spin/spun/spinning
        tiptoe stroll dash gallop swing/swung/swinging sneak bounce hike
        jog/jogged/jogging stumble leap/leapt/leaping""",
    "speech": """say/said/saying ask shout/shouted/shouting whisper cry reply answer
        call yell explain beg/begged/begging promise mumble announce giggle sigh
        exclaim agree""",
    "perception": """see/saw/seeing notice spot/spotted/spotting find/found/finding
        watch hear/heard/hearing discover smell touch observe""",
    "making": """build/built/building draw/drew/drawing paint make/made/making fix bake
        cook sew/sewed/sewing plant decorate fold design knit/knitted/knitting carve
        assemble repair mix stir/stirred/stirring glue""",
    "care": """help hug/hugged/hugging feed/fed/feeding wash pet/petted/petting brush
        comfort carry clean protect guide thank kiss""",
    "conflict": """push grab/grabbed/grabbing steal/stole/stealing kick hit/hit/hitting
        tease pinch chase snatch scold""",
    "transfer": """give/gave/giving bring/brought/bringing show lend/lent/lending
        send/sent/sending hand offer""",
    "thought": """think/thought/thinking know/knew/knowing hope wish remember
        believe guess wonder decide realize/realized/realizing
        imagine/imagined/imagining understand/understood/understanding""",
    "play": """play sing/sang/singing laugh clap/clapped/clapping smile cheer pretend
        wave whistle hum/hummed/humming juggle/juggled/juggling""",
}

ADVERBS = {
    "joyful manner": "happily joyfully cheerfully proudly gladly merrily excitedly",
    "sad manner": "sadly unhappily gloomily tearfully miserably",
    "angry manner": "angrily crossly grumpily furiously",
    "fearful manner": "nervously shyly anxiously fearfully",
    "speed": "quickly slowly suddenly quietly loudly softly carefully gently bravely",
}

OTHERS = {
    "number": "two three four five six seven eight nine ten twelve twenty",
    "time of day": "morning afternoon evening night noon sunset dawn",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "season": "spring summer autumn winter",
    "sound": """bang crash splash buzz pop thump whoosh boom click squeak rustle
        snap ding plop clang hiss""",
    "material": "paper cloth clay sand wool glass metal silk cardboard mud",
}

# Words that stand in the templates themselves.
FUNCTION = {
    "connective": """because when while although so but and or if that until before
        after since then though""",
    "negation": "not never no nothing nobody didn't couldn't don't can't wasn't isn't",
    "article": "a an the",
    "preposition": """in on at to with from under near behind beside into over of for
        by through around inside without about between across""",
    "be singular": "was is",
    "be plural": "were are",
    "question word": "what where why who how",
    "modal": "could would can will must should might may",
    "quantifier": "many some all every each both few more",
    "greeting": "hello hi goodbye welcome please thank thanks sorry",
}

# The group that a concept belongs to; a word of the one carries the other, too.
GROUPS = {
    "name": ("girl name", "boy name"),
    "place": ("outdoor place", "indoor place"),
    "positive emotion": ("joy", "joyful manner"),
    "negative emotion": (
        *("sadness", "anger", "fear"),
        *("sad manner", "angry manner", "fearful manner"),
    ),
    "emotion": ("joy", "sadness", "anger", "fear", "surprise"),
    "character trait": ("virtue", "vice"),
    "verb": tuple(VERBS),
    "noun": tuple(NOUNS),
    "adjective": tuple(ADJECTIVES),
    "adverb": tuple(ADVERBS),
}
