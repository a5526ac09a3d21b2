"""Values for the slots of the recipe: names, places, numbers and documents of six languages.

About half of the names come from lists, and half from a character model of these lists, so that a model must
use form and context and cannot memorise a list. All draws use the random generator that is passed in.
"""

import re
import string

LANGUAGES = ("en", "de", "nl", "fr", "es", "it")

FIRST = {
    "en": """Aaron Abigail Adam Aidan Alan Albert Alexandra Alfie Alice Alison Amanda Amber Amelia Amy
Andrew Angela Anna Anthony April Archie Arthur Ashley Audrey Austin Ava Barbara Barry Beatrice Ben
Benjamin Bernard Beth Betty Beverly Bill Blake Brandon Brenda Brian Bruce Caleb Callum Cameron Carl Carol
Caroline Catherine Charles Charlotte Chloe Christine Christopher Claire Clara Clark Clive Cody Colin
Connor Craig Crystal Curtis Cynthia Daisy Dale Daniel Darren David Dawn Dean Deborah Dennis Derek Diana
Donald Donna Dorothy Douglas Duncan Dylan Earl Edith Edward Eileen Elaine Eleanor Elijah Elizabeth Ella
Ellen Elliot Elsie Emily Emma Eric Erin Ethan Eugene Eva Evan Evelyn Faith Felicity Fiona Florence Frances
Frank Fred Freya Gail Gary Gavin Gemma George Georgia Gerald Gloria Gordon Grace Graham Grant Greg Hannah
Harold Harriet Harry Harvey Hazel Heather Heidi Helen Henry Holly Howard Hugh Ian Imogen Irene Iris Isaac
Isabel Isla Ivy Jack Jacob Jake James Jamie Jane Janet Jasmine Jason Jean Jeffrey Jennifer Jeremy Jessica
Jill Joan Jodie Joel Jonathan Jordan Joseph Joshua Joyce Judith Julia Julian June Justin Karen Kate Kayla
Keith Kelly Kenneth Kevin Kieran Kimberly Kirsty Kyle Lauren Lawrence Leah Leonard Leslie Lewis Liam Lily
Linda Logan Louise Lucas Lucy Luke Lydia Madison Malcolm Marcus Margaret Marilyn Mark Martha Martin Mason
Matthew Maureen Max Megan""",
    "de": """Achim Adelheid Alexander Alfred Alina Amelie Andrea Andreas Anja Anke Anneliese Annika Antje
Anton Armin Arne Astrid August Axel Barbara Bastian Beate Bernd Bernhard Bettina Birgit Bjoern Bodo
Brigitte Bruno Carina Carla Carsten Cem Charlotte Christa Christian Christoph Clemens Cornelia Dagmar
Daniela Detlef Dieter Dietmar Dirk Dominik Doris Dorothea Eberhard Eckhard Edeltraud Elfriede Elias Elke
Elsbeth Emil Emilia Erich Erika Ernst Erwin Esther Eva Fabian Falk Felix Ferdinand Finn Florian Franz
Franziska Frauke Frieda Friedrich Fritz Gabriele Georg Gerda Gerhard Gerlinde Gernot Gertrud Gisela Greta
Gudrun Guenter Gunther Gustav Hannelore Hanna Hannes Hans Harald Hartmut Hedwig Heidemarie Heike Heiko
Heinrich Heinz Helga Helmut Henning Henrike Herbert Hermann Hilde Hildegard Holger Horst Hubert Ilse Ines
Inge Ingeborg Ingo Ingrid Irmgard Isabell Jana Jannik Jens Joachim Jochen Johanna Johannes Jonas Jörg
Josef Judith Julian Jürgen Jutta Kai Karin Karl Karsten Kaspar Katharina Katja Kathrin Kerstin Kilian
Klara Klaus Konrad Konstantin Kristin Kurt Lars Laura Lea Lena Lennart Leon Leonie Lieselotte Lina Linus
Lisa Lorenz Lothar Ludwig Luisa Lukas Luzia Magdalena Maja Malte Manfred Manuela Marcel Mareike Margarete
Marianne Marion Markus Marlene Martina Mathilde Matthias Maximilian Mechthild Meike Melanie Merle Michaela
Mirko Monika Moritz Nadine Niklas Nils Norbert Olaf Oliver Oskar Otto Pascal Patrick Paula Petra Philipp
Pia Rainer Ralf Regina Reinhard Renate Rolf Rosemarie Rüdiger Sabine Selma Silke Simon Sonja Stefan
Steffen Susanne Sven Svenja Swantje Tanja Thea Theodor Thorsten Tilmann Timo Tobias Torben Udo Ulrich
Ursula Ute Uwe Valentin Veronika Viktor Volker Waltraud Werner Wilhelm Wolfgang""",
    "nl": """Aad Aafke Aart Abel Adriaan Albert Alwin Anneke Annelies Anouk Ans Arend Arie Arjan Arnold
Astrid Baukje Bart Bas Bastiaan Beatrijs Bert Bianca Boudewijn Bram Brechtje Brigitte Cas Casper Cees
Christiaan Claartje Coen Conny Cor Corrie Daan Danique Dennis Diederik Dirk Dora Doutzen Eefje Elke Els
Elsje Emiel Emma Erik Esmee Evelien Evert Famke Fedde Femke Fenna Ferdinand Fien Fleur Floor Floris Fokke
Frank Frans Frederik Freek Frits Gerard Gerda Gerrit Gerben Gijs Godelieve Greetje Guus Hanneke Hannah
Hans Harm Heleen Hendrik Henk Hester Hidde Hilde Huib Hugo Ilse Imke Ineke Inge Ingeborg Irene Isa Ivo
Jaap Jacob Jacqueline Jan Janneke Jannes Jasmijn Jasper Jelle Jeroen Jesse Jet Jikke Jip Jitske Job Joep
Johan Johanna Joke Joost Jolanda Joris Jos Josephien Judith Jurgen Jurre Kaatje Karel Karin Kasper Katrijn
Kees Kim Klaas Koen Koos Laurens Lars Leen Lenneke Leo Leontien Lianne Lieke Lies Liesbeth Linde Loes
Lotte Lucas Luuk Maaike Maarten Machteld Madelief Manon Marc Margriet Marieke Marijke Marijn Marit
Marjolein Marloes Martijn Mathijs Maud Max Meike Menno Merel Michiel Mieke Mila Minke Mirjam Mirthe Myrthe
Nanda Neeltje Nelleke Nick Nico Niek Niels Nienke Noor Olga Olivier Oscar Otto Paul Paulien Peter Petra
Pien Pieter Pim Quinten Ramon Reinier Renske Rianne Rik Rinske Rob Robbert Roel Roeland Roos Rosanne Ruben
Rutger Ruud Saar Sander Sanne Saskia Sebastiaan Siebe Siem Sietske Simone Sjoerd Sofie Stefan Steven Stijn
Susanne Suze Sven Tamara Teun Thea Theo Thijs Thirza Thomas Tijmen Tim Tineke Tjeerd Tom Tonny Trijntje
Truus Twan Veerle Vera Vincent Wendelien Wessel Wiebe Wietske Wilhelmina Willem Wim Wouter Yvonne Ynske
Zoë""",
    "fr": """Adèle Adrien Agathe Agnès Alain Albane Alexandre Alexis Alice Alix Amandine Amélie Anaïs
André Angélique Anne Annick Antoine Antonin Apolline Ariane Armand Arnaud Arthur Aude Audrey Aurélie
Aurélien Axelle Baptiste Barnabé Bastien Béatrice Benjamin Benoît Bérénice Bernadette Bernard Bertrand
Blandine Brigitte Bruno Camille Capucine Carine Carole Caroline Catherine Cécile Cédric Céline Chantal
Charlène Christelle Christian Christine Christophe Claire Clarisse Claude Claudine Clément Clémence
Colette Constance Coralie Corentin Corinne Cyril Damien Daniel Danielle David Delphine Denis Diane Didier
Dominique Dorothée Édith Édouard Éléonore Élise Élodie Éloïse Émilie Émile Emmanuel Enzo Éric Estelle
Étienne Eugénie Eva Évelyne Fabien Fabienne Fabrice Fanny Félix Fernand Flavie Florence Florian Francine
Franck François Françoise Frédéric Gabriel Gaëlle Gaétan Gaspard Gaston Geneviève Georges Gérald Gérard
Germaine Gilbert Gilles Gisèle Grégoire Guillaume Guy Gwenaëlle Hélène Henri Henriette Hervé Honorine Hugo
Huguette Inès Irène Isabelle Ivan Jacqueline Jacques Jean Jeanne Jérémy Jérôme Joachim Joël Joëlle
Jocelyne Joseph Josette Judith Jules Julie Julien Juliette Justine Karine Laëtitia Lambert Laure Laurence
Laurent Léa Léo Léon Léonie Liliane Line Lionel Loïc Lola Louis Louise Loup Luc Lucas Lucie Lucien
Ludivine Madeleine Manon Marc Marcel Margaux Marguerite Marianne Marie Marine Marion Marius Marthe Martine
Mathieu Mathilde Maud Maurice Maxence Maxime Mélanie Michel Mireille Monique Morgane Muriel Mylène Nadège
Nadine Nathalie Nicolas Nicole Noé Noémie Océane Odette Olivier Pascal Pascale Patrice Patrick Paul
Paulette Pauline Philippe Pierre Quentin Rachel Raphaël Raymond Régine Régis Rémi Renaud René Richard
Robert Roger Roland Romain Rosalie Roselyne Sabine Sandrine Serge Séverine Simone Solange Sophie Stéphane
Suzanne Sylvain Sylvie Tanguy Théo Thérèse Thibault Thierry Thomas Valérie Victor Vincent Virginie Viviane
Xavier Yannick Yves Yvette Yvonne Zoé""",
    "es": """Abel Abril Adela Adolfo Adrián Adriana Agustín Ainhoa Aitana Aitor Alba Alberto Alejandra
Alejandro Alfonso Alfredo Alicia Almudena Alonso Álvaro Amalia Amaya Amparo Ana Anabel Andrés Ángel Ángela
Ángeles Antonia Antonio Araceli Ariadna Armando Arturo Ascensión Asunción Aurelio Aurora Azucena Beatriz
Begoña Belén Benito Bernardo Berta Blanca Borja Brenda Bruno Camila Candela Carla Carlos Carmelo Carmen
Carolina Catalina Cayetana Cecilia Celia César Clara Claudia Concepción Consuelo Cristian Cristina
Cristóbal Damián Daniel Daniela Darío David Delia Diana Diego Dolores Domingo Eduardo Elena Elisa Eloy
Elvira Emilia Emilio Encarnación Enrique Ernesto Esperanza Esteban Estefanía Ester Eugenia Eugenio Eva
Fabián Fátima Federico Felipe Félix Fermín Fernanda Fernando Fidel Florencia Francisca Francisco Gabriel
Gabriela Gema Genoveva Gerardo Germán Gloria Gonzalo Gregorio Guadalupe Guillermo Gustavo Héctor Hernán
Hugo Iker Inés Inmaculada Irene Iris Isabel Isidro Ismael Iván Izan Jacinto Jacobo Jaime Javier Jazmín
Jesús Jimena Joaquín Jorge José Josefa Juan Juana Julia Julián Julio Laura Leandro Leire Leonardo Leonor
Leticia Lidia Lorena Lorenzo Lourdes Lucas Lucía Luciano Luis Luisa Macarena Magdalena Manuel Manuela
Marcela Marcelo Marcos Margarita María Mariana Mariano Marina Mario Marisol Marta Martín Mateo Matías
Mauricio Mercedes Micaela Miguel Milagros Mireia Míriam Mónica Montserrat Nadia Natalia Nerea Nicolás
Nieves Noelia Noemí Nuria Octavio Olga Óscar Pablo Paloma Paola Pascual Patricia Paula Pedro Pilar Rafael
Ramiro Ramón Raquel Raúl Rebeca Remedios Ricardo Roberto Rocío Rodolfo Rodrigo Rogelio Rosa Rosalía
Rosario Rubén Salvador Samuel Sandra Santiago Sara Saúl Sebastián Sergio Silvia Sofía Soledad Sonia Susana
Tamara Teresa Tomás Trinidad Valentina Valeria Vanesa Verónica Vicente Víctor Violeta Virginia Xavier
Ximena Yolanda""",
    "it": """Achille Ada Adalberto Adele Agata Agnese Agostino Alberto Alda Aldo Alessandra Alessandro
Alessia Alessio Alfio Alfredo Alice Amedeo Amelia Andrea Angela Angelo Anita Anna Annamaria Annunziata
Antonella Antonio Arianna Armando Arturo Asia Attilio Augusto Aurora Azzurra Barbara Bartolomeo Beatrice
Benedetta Benedetto Beniamino Bernardo Bianca Brando Bruna Bruno Camilla Camillo Carla Carlo Carlotta
Carmela Carmine Caterina Cecilia Celeste Cesare Chiara Cinzia Ciro Clara Claudia Claudio Concetta Corrado
Cosimo Costanza Cristiano Cristina Dalila Damiano Daniela Daniele Dario Davide Debora Diana Diego Domenica
Domenico Donatella Donato Edoardo Egidio Elena Eleonora Elia Elisa Elisabetta Emanuela Emanuele Emilia
Emilio Emma Ennio Enrica Enrico Enzo Ermanno Ernesto Ester Ettore Eugenia Eugenio Eva Fabiana Fabio
Fabrizio Fausto Federica Federico Felice Ferdinando Filippo Fiorella Flavia Flavio Franca Francesca
Francesco Franco Fulvia Gabriele Gabriella Gaetano Gaia Gennaro Giacomo Giada Gianluca Gianna Gianni Gilda
Ginevra Gino Gioele Giordano Giorgia Giorgio Giovanna Giovanni Giulia Giulio Giuseppe Giuseppina Grazia
Graziano Guglielmo Guido Ilaria Irene Isabella Ivan Ivana Jacopo Lara Laura Lavinia Leonardo Letizia Lidia
Liliana Livia Lorella Lorenzo Loretta Luca Lucia Luciana Luciano Ludovica Luigi Luisa Maddalena Manuela
Mara Marcella Marcello Marco Margherita Maria Marianna Mariella Marina Mario Marisa Marta Martina
Massimiliano Massimo Matilde Matteo Mattia Maurizio Michela Michele Milena Miriam Mirko Moira Monica
Morena Nadia Natalia Nicola Nicolò Nicoletta Nina Noemi Norma Nunzia Olga Olimpia Orazio Ornella Orsola
Oscar Ottavia Ottavio Pamela Paola Paolo Pasquale Patrizia Pia Piero Pietro Pina Raffaele Raffaella
Rebecca Renata Renato Riccardo Rita Roberta Roberto Rocco Romina Romolo Rosa Rosanna Rosario Ruggero
Sabina Sabrina Salvatore Samuele Sandra Sandro Santina Sara Saverio Sebastiano Serena Sergio Silvana
Silvia Silvio Simona Simone Sofia Sonia Stefania Stefano Susanna Tatiana Teresa Tiziana Tommaso Ugo
Umberto Valentina Valeria Vanessa Vera Vincenzo Viola Virginia Vito Vittoria""",
}

LAST = {
    "en": """Abbott Adams Ainsley Allen Anderson Andrews Archer Armstrong Arnold Atkins Atkinson Austin
Bailey Baker Baldwin Ball Barker Barlow Barnes Barrett Barton Bates Baxter Beckett Bell Bennett Benson
Berry Bishop Blackburn Blake Bolton Booth Bowen Boyd Bradford Bradley Brennan Briggs Brooks Brown Bryant
Buckley Burgess Burke Burns Burton Butcher Butler Byrne Callahan Cameron Campbell Carlson Carpenter Carr
Carroll Carter Chambers Chandler Chapman Clark Clarke Clayton Cole Coleman Collins Conway Cook Cooper Cox
Crawford Cross Cunningham Curtis Dalton Daniels Davidson Davies Dawson Dixon Donnelly Douglas Doyle Drake
Duffy Duncan Dunn Edwards Elliott Ellis Evans Farrell Ferguson Fields Finch Fisher Fleming Fletcher Flynn
Ford Forster Foster Fowler Fox Francis Fraser Freeman Fuller Gallagher Gardner Garner Gibbs Gibson Gilbert
Glover Goodwin Gordon Graham Grant Graves Gray Greene Griffin Griffiths Hale Hall Hamilton Hammond Hancock
Harding Hardy Harper Harrington Harris Hart Harvey Hawkins Hayes Henderson Higgins Hill Hodges Hoffman
Holland Holmes Holt Hopkins Horton Houghton Howell Hudson Hughes Hunt Hurst Hutchinson Ingram Irwin
Jackson Jacobs Jarvis Jenkins Jennings Johnston Jordan Kane Keating Kemp Kendall Kennedy Kerr Kirby Knight
Lambert Lancaster Lane Larson Lawson Leach Lindsay Lloyd Lowe Lynch MacDonald Mackenzie Malone Manning
Marsh Marshall Mason Matthews McCarthy McCoy McKay Mercer Middleton Mills Mitchell Morgan Morris Morrison
Murphy Murray Nash Newman Nicholson Nolan Norris Oakley Osborne Owen Palmer Parker Parsons Patterson Payne
Pearce Perkins Perry Phillips Pickering Porter Potter Powell Pratt Preston Price Quinn Ramsey Randall Reed
Reynolds Rhodes Richards Riley Roberts Rogers Rowe Russell Sanders Saunders Sawyer Schofield Sharp Shaw
Shepherd Simmons Slater Spencer""",
    "de": """Abel Ackermann Adler Albrecht Altmann Arndt Auer Bachmann Baier Barth Bartsch Bauer Baumann
Baumgartner Beck Becker Behrens Bender Berger Bergmann Bernhardt Biermann Binder Blum Bock Böhm Bohnert
Born Brandt Braun Breuer Brinkmann Bruckner Brunner Buchholz Büchner Burger Busch Christ Clausen Dahmen
Decker Dietrich Döring Dreher Drescher Eberle Ebert Eckert Ehlers Eichhorn Engel Engelhardt Ernst Esser
Falk Feldmann Fiedler Fink Fischer Fleischer Förster Franke Freund Frey Friedrich Fritsch Fröhlich Fuchs
Funk Gärtner Gebhardt Geiger Gerlach Giese Göbel Götz Graf Greiner Grimm Groß Großmann Günther Haas Hahn
Hansen Hartmann Haupt Hauser Heck Heil Heinemann Heinrich Heller Henkel Hensel Hermann Heß Heuer
Hildebrandt Hinz Hirsch Hofmann Holz Horn Huber Hummel Jacobs Jäger Jahn Janssen Jung Junker Kaiser
Karsten Kastner Kaufmann Keller Kern Kessler Kirchner Klein Kluge Knapp Knoll Koch Köhler König Konrad
Körner Kraft Kramer Krämer Kraus Krebs Kremer Kröger Krüger Kruse Kuhn Kunz Kunze Lang Lange Lechner
Lehmann Lenz Linder Löffler Lorenz Ludwig Lutz Maier Martens Marx Maurer Mayer Meier Menzel Merkel Merz
Metzger Michel Miller Mohr Möller Moser Müller Münch Nagel Neubauer Neumann Nickel Noack Nolte Nowak Ochs
Opitz Ott Otte Pape Paulsen Peters Petersen Pfeffer Pfeiffer Pohl Preuß Probst Raab Rauch Rausch Reich
Reichert Reimann Reinhardt Reiter Renner Reuter Richter Riedel Ritter Röder Römer Rose Roth Rudolph Rupp
Sachs Sander Sauer Schäfer Schaller Scherer Schiller Schilling Schlegel Schlüter Schmid Schmitt Schmitz
Schneider Scholz Schön Schreiber Schröder Schubert Schulte Schulz Schumacher Schuster Schütz Schwab
Schwarz Seidel Seifert Siebert Simon Sommer Springer Stahl Stein Steiner Stengel Stephan Stock Stolz
Strauß Sturm Thiel Thiele Thoma Uhlig Ullrich Unger Urban Vetter Vogel Vogt Voigt Volk Wagner Walter Weber
Wegner Weidner Weiß Weller Wendt Werner Wieland Wiese Wild Winkler Winter Wirth Wittmann Wolf Wolff Wulf
Zander Ziegler Zimmer""",
    "nl": """Aalbers Aerts Akkerman Appelman Baak Bakker Baars Barends Bastiaansen Beekman Beenakker
Bekker Benschop Bergsma Beukers Bijl Blok Blom Boer Bogaard Bolt Boogaard Boom Bos Bosch Bosma Bouman
Bouwman Braam Brands Bredero Brinkman Broekhuizen Brouwer Bruin Bruinsma Buis Burger Buurman Claassen
Cornelissen Coster Cuypers Daalder Dam Damen Dekker Dijk Dijkman Dijkstra Doorn Driessen Drost Duin
Dubbeld Elzinga Engels Evers Faber Fokkema Franken Geerts Gerritsen Geurts Gielen Goossens Graaf Groen
Groenewegen Groot Haak Haan Hageman Hartog Haverkamp Heemskerk Hekman Helmers Hendriks Hermans Heuvel Hoek
Hoekstra Hofman Hofstra Hogendoorn Hollander Hoogland Hoogeveen Houtman Huisman Huizinga Hulst Jaarsma
Jacobs Jansen Janssens Jonker Kamp Kamphuis Keijzer Kemper Kersten Klaassen Klein Klomp Kok Kolk Koning
Koopman Kooistra Koster Kraaijeveld Kramer Kroon Kuiper Kuipers Laan Lammers Langeveld Leeuwenburg Lemmens
Linden Lohman Loon Lubbers Maas Maassen Manders Martens Meeuwissen Meijer Mertens Meulen Michielsen
Molenaar Mulder Muller Naber Nauta Nieuwenhuis Nijhof Nijland Noordhoek Nooteboom Oosterhuis Oosterveld
Oudejans Paas Pauwels Peeters Pieters Ploeg Polman Pool Post Postma Prins Pronk Quist Raaijmakers
Reijnders Reinders Rietveld Rijnders Ritsema Roelofs Romijn Roos Rosier Ruiter Rutten Sanders Schaap
Schepers Scherpenzeel Schippers Scholten Schouten Schrijver Schut Segers Sikkema Slager Sloot Smeets Smid
Smits Snijders Spaans Spijker Staal Stam Steen Steenbergen Sterk Stolk Straver Swinkels Tamminga Terpstra
Teunissen Thijssen Timmer Timmerman Tolsma Tuinman Uitdenbogaard Veen Veenstra Velde Veldhuis Veldman
Verbeek Verbruggen Verduin Verhagen Verheul Verhoeven Vermeer Vermeulen Verschoor Versteeg Vink Visscher
Visser Vlieger Vogelaar Vos Vroom Vries Wagenaar Walstra Waterman Weijers Wessels Westra Wiegers Wiersma
Wijnands Wilms Winkel Witteveen Wolters Wortel Zandstra Zeeman Zijlstra Zomer Zuidema Zwart""",
    "fr": """Adam Allard Alexandre Andrieu Arnoux Aubert Aubry Bailly Barbier Baron Barre Barthélemy
Baudry Bazin Beaumont Benard Benoit Berger Bernard Berthelot Bertin Bertrand Besnard Besson Blanc
Blanchard Blondel Bodin Boisson Bonneau Bonnet Bouchard Boucher Boulanger Bourdon Bourgeois Boutin Bouvier
Boyer Breton Briand Brunet Bureau Buisson Camus Carlier Caron Carpentier Carré Cartier Chapuis Charles
Charpentier Chartier Chauvin Chevalier Clément Colas Colin Collet Cordier Cornu Coste Cottin Courtois
Cousin Couturier Daniel David Delahaye Delannoy Delattre Delaunay Delmas Delorme Denis Deschamps Devaux
Didier Doucet Drouet Dubois Duchêne Dufour Duhamel Dumas Dumont Dupin Dupuis Dupuy Durand Duval Etienne
Evrard Fabre Faivre Faure Favre Ferrand Ferry Fleury Fontaine Forestier Fouquet Fournier Francois Gaillard
Garnier Gaudin Gauthier Gautier Gay Georges Gérard Germain Gilbert Gilles Girard Giraud Godard Gonthier
Grandjean Granger Grégoire Grenier Grondin Gros Guérin Guichard Guilbert Guillaume Guillot Guyot Hamel
Hardy Hébert Henry Hervé Hoarau Hubert Huet Humbert Imbert Jacob Jacquet Jacquot Jolivet Joly Josse
Jourdan Joubert Julien Klein Labbé Lacombe Lacroix Lafont Lagarde Lambert Lamy Langlois Laporte Laroche
Latour Launay Laurent Lavigne Leblanc Lebrun Leclerc Leclercq Lecomte Leconte Ledoux Lefebvre Lefort
Legendre Léger Legrand Lejeune Lemaire Lemaître Lemoine Lenoir Leroux Lesage Levasseur Leveque Loiseau
Lombard Louis Lucas Maillard Mallet Manceau Marchal Marchand Maréchal Marin Martel Marty Masson Mathieu
Maury Menard Mercier Meunier Michaud Michel Millet Monnier Moreau Morel Morin Morvan Moulin Muller Navarro
Neveu Nicolas Noel Normand Olivier Ollivier Pages Paris Parent Pascal Pasquier Paul Pelletier Perret
Perrier Perrin Perrot Petit Philippe Picard Pichon Pineau Poirier Pons Poulain Prévost Prigent Quentin
Raynaud Regnier Rémy Renard Renaud Rey Richard Rivière Robin Roche Rolland Rossignol Rousseau Roussel Roux
Roy Salmon Sauvage Schmitt Seguin Simon Tanguy Tessier Texier Thibault Tournier Valentin Vallée Vasseur
Verdier Vidal Vincent Voisin Weber""",
    "es": """Abad Acosta Aguado Aguilar Aguirre Alarcón Alcalá Alcántara Alfaro Alonso Álvarez Andrade
Antón Aparicio Aragón Aranda Arce Arias Arroyo Ávila Ayala Baeza Ballesteros Barragán Barrera Barrios
Bautista Becerra Beltrán Benítez Bermejo Bermúdez Bernal Blanco Blasco Bravo Bueno Caballero Cabello
Cabrera Calderón Calvo Camacho Campos Cano Cantero Carballo Cárdenas Carmona Carrasco Carrera Carrillo
Casado Casas Castaño Castellanos Castillo Castro Cerezo Cervera Cisneros Conde Contreras Córdoba Corral
Correa Cortés Costa Crespo Cruz Cuesta Cuevas Dávila Delgado Domínguez Durán Echeverría Escobar Escribano
Escudero Espinosa Esteban Estrada Expósito Fajardo Ferrer Figueroa Flores Fontanet Franco Fuentes Galán
Gallardo Gallego Gálvez García Garrido Gil Giménez Godoy Gómez González Gracia Guerra Guerrero Guillén
Gutiérrez Guzmán Heredia Hernández Herranz Herrera Herrero Hidalgo Hurtado Ibáñez Iglesias Izquierdo Jara
Jiménez Jurado Lara León Linares Llorente Lorenzo Lozano Lucas Luque Macías Maldonado Manzano Marcos Marín
Márquez Martínez Mateos Medina Mejía Méndez Menéndez Merino Mesa Miranda Molina Monge Montero Montes
Montoya Mora Morales Morán Moreno Moya Múgica Muñoz Murillo Navarro Navas Nieto Núñez Ocampo Ojeda
Olivares Oliver Olmedo Ordóñez Orozco Ortega Ortiz Otero Pacheco Padilla Palacios Palomino Pardo Paredes
Parra Pascual Pastor Paz Peláez Peña Peralta Pereira Pérez Pineda Pizarro Plaza Polo Pons Porras Portillo
Prado Prieto Puig Quesada Quintana Ramírez Ramos Redondo Requena Rey Reyes Ribera Ríos Riquelme Rivas
Rivera Robledo Robles Rodríguez Rojas Roldán Román Romero Rosales Rubio Rueda Ruiz Saavedra Sáez Salas
Salazar Salgado Salinas Sánchez Sancho Sandoval Santamaría Santana Santiago Santos Sanz Saura Segovia
Segura Serra Serrano Sierra Silva Simón Solano Soler Soria Soto Suárez Tapia Toledo Tomás Torres Trujillo
Valdés Valencia Valero Valle Vallejo Valverde Varela Vargas Vázquez Vega Velasco Vélez Vera Vergara
Vicente Vidal Vila Villalba Villanueva Villar Villegas Yáñez Zabala Zamora Zapata Zárate""",
    "it": """Abate Agostini Albanese Alberti Alfano Amato Amoroso Andreoli Angelini Antonelli Arena Baldi
Baldini Barbato Barbieri Barone Barsotti Basile Basso Battaglia Bellini Belli Bellucci Benedetti Benvenuti
Berardi Bernardi Bertini Bertolini Bettini Biagi Bianchi Bianco Bonetti Bonfanti Borghi Borrelli Boscolo
Bottino Bruni Bruno Bucci Calabrese Calvi Campana Caputo Carbone Cardinale Carta Caruso Casadei Casagrande
Castelli Catalano Cattaneo Cavalli Cavallaro Ceccarelli Cecchini Cerri Cesari Chiesa Cirillo Cocco Colella
Colombo Conte Conti Coppola Corsi Corsini Cosentino Costa Costantini Cozzolino Cristofori Croce Damiani
Deiana Deluca Diana Donati Durante Esposito Fabbri Fabris Falcone Fantini Farina Fasano Fava Fazio
Federici Ferrante Ferrara Ferrari Ferraro Ferretti Ferri Filippi Fiore Fiorentini Fontana Forte Franchi
Fusco Gabrielli Galasso Galli Gallo Gargiulo Garofalo Gasparini Gatti Gentile Gerace Germani Ghezzi Giglio
Giordani Giordano Girardi Giuliani Grassi Grasso Greco Grillo Grimaldi Gualtieri Guarino Guerra Guida
Guidi Iacono Iannone Iovine Lanza Leone Leoni Lepore Liguori Locatelli Lombardi Lombardo Longo Luciani
Lupo Macchi Maggi Magnani Mancini Manfredi Mangano Manna Marchese Marchetti Marchi Mariani Marinelli
Marini Marino Mariotti Marra Martelli Martinelli Martini Martino Masi Massa Matarazzo Mauri Mazza Mazzei
Melis Meloni Merlo Messina Miele Milani Minelli Molinari Monaco Montanari Monti Morabito Morelli Moretti
Mori Moro Morandi Motta Musso Napoli Napolitano Nardi Negri Neri Nicoletti Olivieri Orlando Orsini Orsi
Pace Pagano Palermo Palmieri Palumbo Panico Paolini Papa Parisi Parodi Pasini Pasquali Pastore Pavan
Pellegrini Pellegrino Perini Perrone Persico Pepe Piazza Piccolo Pinna Piras Pisano Poletti Poli Ponti
Porcu Pozzi Pugliese Quaranta Raimondi Ranieri Rapisarda Riccardi Ricci Ricciardi Righi Rinaldi Riva Rizzi
Rizzo Rocca Rocchi Romagnoli Romani Romano Romeo Ronchi Rosati Rossetti Rossi Rota Ruggeri Ruggiero Russo
Sabatini Sacchi Sala Salerno Salvi Sanna Santini Santoro Sartori Scala Serra Sforza Silvestri Simeone
Sorrentino Spada Spinelli Stella Tedesco Testa Tosi Trevisan Valente Valentini Venturi Venturini Verdi
Vianello Villa Villani Vitale Vitali Viviani Volpe Zanella Zanetti""",
}

CITY = {
    "en": """Aberdeen|Albany|Ashford|Austin|Baltimore|Bath|Belfast|Birmingham|Blackpool|Boise|Bolton|
Boston|Boulder|Bradford|Brighton|Bristol|Buffalo|Calgary|Cambridge|Canterbury|Cardiff|Carlisle|Charleston|
Chelmsford|Chester|Chicago|Cleveland|Columbus|Cork|Coventry|Dallas|Denver|Derby|Detroit|Dover|Dublin|
Dundee|Durham|Edinburgh|El Paso|Exeter|Fresno|Galway|Glasgow|Gloucester|Halifax|Hamilton|Hartford|
Hastings|Houston|Hull|Inverness|Ipswich|Kansas City|Lancaster|Leeds|Leicester|Lincoln|Liverpool|
Long Beach|Los Angeles|Luton|Manchester|Melbourne|Memphis|Miami|Milwaukee|Minneapolis|Nashville|New Haven|
New York|Newport|Norwich|Nottingham|Oakland|Omaha|Ottawa|Oxford|Perth|Peterborough|Phoenix|Plymouth|
Portland|Portsmouth|Preston|Reading|Richmond|Rochester|Sacramento|Salisbury|San Diego|Seattle|Sheffield|
Southampton|Spokane|St. Albans|Sunderland|Swansea|Swindon|Sydney|Tampa|Toronto|Tulsa|Vancouver|Wakefield|
York""",
    "de": """Aachen|Augsburg|Bad Homburg|Bamberg|Basel|Bayreuth|Berlin|Bern|Bielefeld|Bochum|Bonn|Bottrop|
Braunschweig|Bregenz|Bremen|Bremerhaven|Celle|Chemnitz|Cottbus|Darmstadt|Dessau|Dortmund|Dresden|Duisburg|
Düsseldorf|Eisenach|Emden|Erfurt|Erlangen|Essen|Esslingen|Flensburg|Frankfurt am Main|Freiburg|Fulda|
Fürth|Gera|Gießen|Görlitz|Göttingen|Graz|Greifswald|Hagen|Halle|Hamburg|Hamm|Hanau|Hannover|Heidelberg|
Heilbronn|Hildesheim|Ingolstadt|Innsbruck|Jena|Karlsruhe|Kassel|Kiel|Klagenfurt|Koblenz|Köln|Konstanz|
Krefeld|Landshut|Leipzig|Leverkusen|Linz|Lübeck|Luzern|Magdeburg|Mainz|Mannheim|Marburg|München|Münster|
Neuss|Nürnberg|Oldenburg|Osnabrück|Paderborn|Passau|Potsdam|Regensburg|Rosenheim|Rostock|Saarbrücken|
Salzburg|Schwerin|Siegen|Solingen|Speyer|St. Gallen|Stralsund|Stuttgart|Trier|Tübingen|Ulm|Weimar|Wien|
Wiesbaden|Winterthur|Worms|Wuppertal|Würzburg|Zürich|Zwickau""",
    "nl": """Aalst|Alkmaar|Almelo|Almere|Alphen aan den Rijn|Amersfoort|Amstelveen|Amsterdam|Antwerpen|
Apeldoorn|Arnhem|Assen|Bergen op Zoom|Breda|Brugge|Brussel|Bussum|Culemborg|Delft|Delfzijl|Den Bosch|
Den Haag|Den Helder|Deventer|Doetinchem|Dokkum|Dordrecht|Drachten|Ede|Eindhoven|Emmen|Enkhuizen|Enschede|
Franeker|Geleen|Gent|Goes|Gorinchem|Gouda|Groningen|Haarlem|Harderwijk|Harlingen|Hasselt|Heemstede|
Heerenveen|Heerlen|Helmond|Hengelo|Hilversum|Hoofddorp|Hoogeveen|Hoorn|Houten|Huizen|Kampen|Katwijk|
Kerkrade|Kortrijk|Leeuwarden|Leiden|Lelystad|Leuven|Maastricht|Mechelen|Medemblik|Meppel|Middelburg|
Naarden|Nieuwegein|Nijmegen|Oss|Oostende|Purmerend|Roermond|Roosendaal|Rotterdam|Schiedam|Sittard|Sneek|
Spijkenisse|Terneuzen|Tiel|Tilburg|Utrecht|Veenendaal|Venlo|Venray|Vlaardingen|Vlissingen|Voorburg|
Wageningen|Weert|Winterswijk|Woerden|Zaandam|Zeist|Zierikzee|Zoetermeer|Zutphen|Zwolle""",
    "fr": """Agen|Aix-en-Provence|Ajaccio|Albi|Amiens|Angers|Angoulême|Annecy|Arles|Arras|Aurillac|
Auxerre|Avignon|Bayonne|Beaune|Beauvais|Belfort|Besançon|Béziers|Biarritz|Blois|Bordeaux|Bourges|Brest|
Brive-la-Gaillarde|Caen|Calais|Cannes|Carcassonne|Chambéry|Chartres|Cherbourg|Clermont-Ferrand|Colmar|
Compiègne|Dieppe|Dijon|Dunkerque|Épinal|Évreux|Fribourg|Gap|Genève|Grenoble|La Rochelle|Laval|Le Havre|
Le Mans|Lausanne|Liège|Lille|Limoges|Lorient|Lyon|Mâcon|Marseille|Metz|Montauban|Montpellier|Montréal|
Mulhouse|Namur|Nancy|Nantes|Narbonne|Neuchâtel|Nevers|Nice|Nîmes|Niort|Orléans|Paris|Pau|Périgueux|
Perpignan|Poitiers|Québec|Quimper|Reims|Rennes|Roanne|Rodez|Rouen|Saint-Étienne|Saint-Malo|Saint-Nazaire|
Saumur|Sète|Strasbourg|Tarbes|Toulon|Toulouse|Tours|Troyes|Valence|Vannes|Verdun|Versailles|Vichy|Vienne""",
    "es": """A Coruña|Albacete|Alcalá de Henares|Alcobendas|Algeciras|Alicante|Almería|Ávila|Badajoz|
Badalona|Barcelona|Bilbao|Bogotá|Buenos Aires|Burgos|Cáceres|Cádiz|Cartagena|Castellón|Ceuta|Chiclana|
Ciudad Real|Córdoba|Cuenca|Cuzco|Denia|Dos Hermanas|Elche|Estepona|Ferrol|Fuenlabrada|Gandía|Getafe|Gijón|
Girona|Granada|Guadalajara|Huelva|Huesca|Jaén|Jerez de la Frontera|La Paz|Las Palmas|Leganés|León|Lima|
Linares|Lleida|Logroño|Lorca|Lugo|Madrid|Málaga|Manresa|Marbella|Mérida|Medellín|Melilla|Montevideo|
Móstoles|Motril|Murcia|Orense|Oviedo|Palencia|Palma|Pamplona|Plasencia|Ponferrada|Pontevedra|Puebla|Quito|
Reus|Ronda|Rosario|Sabadell|Salamanca|San Fernando|San Sebastián|Santa Cruz|Santander|
Santiago de Compostela|Segovia|Sevilla|Soria|Talavera de la Reina|Tarragona|Terrassa|Teruel|Toledo|
Torrejón|Úbeda|Valencia|Valladolid|Vigo|Vitoria|Zamora|Zaragoza""",
    "it": """Agrigento|Alba|Alessandria|Alghero|Ancona|Andria|Aosta|Arezzo|Ascoli Piceno|Asti|Avellino|
Bari|Barletta|Belluno|Benevento|Bergamo|Biella|Bologna|Bolzano|Brescia|Brindisi|Cagliari|Campobasso|Carpi|
Caserta|Catania|Catanzaro|Cesena|Chieti|Chioggia|Como|Cosenza|Cremona|Crotone|Cuneo|Empoli|Faenza|Fano|
Ferrara|Firenze|Foggia|Forlì|Frosinone|Gela|Genova|Gorizia|Grosseto|Imola|Imperia|L'Aquila|La Spezia|
Latina|Lecce|Lecco|Livorno|Lodi|Lucca|Lugano|Macerata|Mantova|Marsala|Massa|Matera|Messina|Milano|Modena|
Monza|Napoli|Novara|Nuoro|Olbia|Oristano|Padova|Palermo|Parma|Pavia|Perugia|Pesaro|Pescara|Piacenza|Pisa|
Pistoia|Pordenone|Potenza|Prato|Ragusa|Ravenna|Reggio Emilia|Rieti|Rimini|Roma|Rovigo|Salerno|San Marino|
Sassari|Savona|Siena|Siracusa|Sondrio|Taranto|Teramo|Terni|Torino|Trani|Trapani|Trento|Treviso|Trieste|
Udine|Urbino|Varese|Venezia|Verona|Viterbo""",
}

COUNTRY = {
    "en": "Albania Argentina Australia Austria Belgium Brazil Canada Chile China Croatia Denmark Egypt "
    "Finland France Germany Ghana Greece Iceland India Ireland Italy Japan Kenya Malta Mexico Morocco Nepal "
    "Norway Peru Poland Portugal Scotland Spain Sweden Turkey Uganda Vietnam Wales",
    "de": "Albanien Argentinien Australien Belgien Brasilien Chile China Dänemark Deutschland England "
    "Estland Finnland Frankreich Griechenland Indien Irland Island Italien Japan Kanada Kroatien Lettland "
    "Luxemburg Marokko Mexiko Norwegen Österreich Polen Portugal Rumänien Schweden Spanien Tunesien Ungarn",
    "nl": "Argentinië Australië België Brazilië Canada China Denemarken Duitsland Egypte Engeland Estland "
    "Finland Frankrijk Griekenland Hongarije Ierland IJsland India Indonesië Italië Japan Kroatië Luxemburg "
    "Marokko Mexico Nederland Noorwegen Oostenrijk Polen Portugal Spanje Suriname Turkije Zweden",
    "fr": "Algérie Allemagne Angleterre Argentine Australie Autriche Belgique Brésil Canada Chili Chine "
    "Danemark Égypte Espagne Finlande France Grèce Hongrie Inde Irlande Islande Italie Japon Luxembourg "
    "Maroc Mexique Norvège Pérou Pologne Portugal Roumanie Sénégal Suède Suisse Tunisie Turquie",
    "es": "Alemania Argentina Australia Austria Bélgica Bolivia Brasil Canadá Chile China Colombia Cuba "
    "Dinamarca Ecuador Egipto España Finlandia Francia Grecia Guatemala Honduras India Irlanda Islandia "
    "Italia Japón Marruecos México Noruega Panamá Perú Polonia Portugal Suecia Suiza Turquía Uruguay",
    "it": "Albania Argentina Australia Austria Belgio Brasile Canada Cile Cina Croazia Danimarca Egitto "
    "Finlandia Francia Germania Giappone Grecia India Inghilterra Irlanda Islanda Italia Lussemburgo Malta "
    "Marocco Messico Norvegia Perù Polonia Portogallo Romania Spagna Svezia Svizzera Tunisia Turchia",
}
JOB = {
    "en": "accountant|architect|baker|barber|biologist|bricklayer|bus driver|butcher|carpenter|chemist|"
    "cleaner|cook|dentist|designer|electrician|engineer|farmer|florist|gardener|glazier|janitor|journalist|"
    "lawyer|librarian|mechanic|midwife|nurse|painter|pharmacist|photographer|pilot|plumber|postman|potter|"
    "roofer|sailor|secretary|shepherd|surgeon|tailor|teacher|translator|vet|waiter|welder",
    "de": "Anwältin|Apotheker|Architektin|Arzt|Bäcker|Bibliothekarin|Biologe|Buchhalterin|Busfahrer|"
    "Dachdecker|Elektriker|Erzieherin|Fotograf|Friseurin|Gärtner|Hausmeister|Hebamme|Imker|Ingenieurin|"
    "Journalist|Kellner|Klempner|Koch|Krankenpfleger|Landwirt|Lehrerin|Maler|Maurer|Mechaniker|Metzger|"
    "Optikerin|Pilot|Schneider|Schreinerin|Schuster|Sekretärin|Steuerberater|Tierärztin|Töpfer|Übersetzerin|"
    "Zahnarzt|Zimmermann",
    "nl": "accountant|advocaat|apotheker|architect|bakker|bibliothecaris|boer|boekhouder|buschauffeur|"
    "conciërge|dakdekker|dierenarts|docent|elektricien|fotograaf|glazenmaker|hovenier|huisarts|imker|"
    "ingenieur|journalist|kapper|kleermaker|kok|lasser|loodgieter|makelaar|matroos|metselaar|monteur|"
    "notaris|ober|piloot|pottenbakker|postbode|schilder|schoonmaker|secretaris|slager|tandarts|timmerman|"
    "tolk|verloskundige|verpleegkundige|visser",
    "fr": "architecte|avocate|berger|bibliothécaire|boucher|boulanger|charpentier|chauffeur de bus|"
    "chirurgien|coiffeuse|comptable|concierge|couturière|couvreur|cuisinier|dentiste|électricien|facteur|"
    "fleuriste|horloger|infirmière|ingénieure|institutrice|jardinier|journaliste|libraire|maçon|mécanicien|"
    "médecin|menuisier|notaire|opticien|peintre|pharmacien|photographe|pilote|plombier|potier|sage-femme|"
    "secrétaire|serveur|traductrice|vétérinaire|vitrier",
    "es": "abogada|agricultor|albañil|apicultor|arquitecto|bibliotecaria|biólogo|camarero|carnicero|"
    "carpintero|cartero|cirujana|cocinero|conductor de autobús|conserje|contable|costurera|dentista|"
    "electricista|enfermera|farmacéutico|florista|fontanero|fotógrafa|ingeniero|jardinero|joyero|maestra|"
    "marinero|mecánico|médico|notario|panadero|pastor|peluquera|periodista|pescador|piloto|pintor|profesora|"
    "secretaria|soldador|traductora|veterinaria|zapatero",
    "it": "agricoltore|architetto|autista|avvocata|barista|bibliotecaria|biologo|calzolaio|cameriere|"
    "chirurgo|contabile|cuoco|dentista|elettricista|falegname|farmacista|fabbro|fioraio|fotografa|geometra|"
    "giardiniere|giornalista|idraulico|imbianchino|infermiera|ingegnere|insegnante|interprete|macellaio|"
    "maestra|marinaio|meccanico|medico|muratore|notaio|orafo|ostetrica|panettiere|parrucchiera|pastore|"
    "pescatore|pilota|portinaio|postino|sarta|segretaria|veterinario",
}
ANIMAL = {
    "en": "ant badger bear beaver bee bull camel cat cow crab crow deer dog donkey duck eagle fox frog goat "
    "goose hamster hare hen horse lamb lizard mouse otter owl parrot pig pony rabbit rat seal sheep snail "
    "spider squirrel swan tortoise trout turkey whale wolf",
    "de": "Adler Ameise Bär Biber Biene Dachs Eichhörnchen Ente Esel Eule Forelle Frosch Fuchs Gans Hamster "
    "Hase Hirsch Huhn Hund Igel Kamel Kaninchen Katze Krähe Kuh Lamm Maus Otter Papagei Pferd Pony Ratte "
    "Reh Schaf Schildkröte Schlange Schnecke Schwan Schwein Spinne Taube Wal Wolf Ziege",
    "nl": "beer bever bij cavia das duif eekhoorn eend egel ezel forel gans geit haas hamster hert hond "
    "kameel kat kikker kip konijn kraai krab lam mier muis otter paard papegaai pony ram rat ree schaap "
    "schildpad slak slang spin uil varken vos walvis wolf zwaan",
    "fr": "abeille agneau aigle âne araignée baleine biche blaireau canard castor cerf chameau chat cheval "
    "chèvre chien cochon corbeau crabe cygne écureuil escargot fourmi grenouille hamster hérisson hibou "
    "lapin lézard lièvre loup loutre mouton oie ours papillon perroquet phoque poney poule rat renard "
    "serpent souris tortue truite vache",
    "es": "abeja águila ardilla araña ballena buey búho burro caballo cabra camello cangrejo caracol castor "
    "cerdo ciervo cisne conejo cordero cuervo erizo foca ganso gallina gato hámster hormiga jabalí lagarto "
    "liebre lobo loro mariposa nutria oso oveja paloma pato perro poni rana rata ratón serpiente tejón "
    "tortuga trucha vaca zorro",
    "it": "agnello anatra ape aquila asino balena bue camello cane capra castoro cavallo cervo cicogna "
    "cigno civetta coniglio corvo criceto farfalla foca formica gallina gatto granchio gufo istrice lepre "
    "lontra lucertola lumaca lupo maiale mucca oca orso pappagallo pecora pony ragno rana riccio scoiattolo "
    "serpente tartaruga topo trota volpe",
}
COLOR = {
    "en": "red blue green yellow black white grey brown purple pink orange turquoise beige silver crimson "
    "teal violet",
    "de": "rot blau grün gelb schwarz weiß grau braun lila rosa orange türkis beige silbern violett "
    "dunkelblau hellgrün",
    "nl": "rood blauw groen geel zwart wit grijs bruin paars roze oranje turkoois beige zilver donkerblauw "
    "lichtgroen",
    "fr": "rouge bleu vert jaune noir blanc gris brun violet rose orange turquoise beige argenté marron "
    "pourpre",
    "es": "rojo azul verde amarillo negro blanco gris marrón morado rosa naranja turquesa beige plateado "
    "violeta granate",
    "it": "rosso blu verde giallo nero bianco grigio marrone viola rosa arancione turchese beige argento "
    "azzurro granata",
}
MONTHS = {
    "en": "January February March April May June July August September October November December",
    "de": "Januar Februar März April Mai Juni Juli August September Oktober November Dezember",
    "nl": "januari februari maart april mei juni juli augustus september oktober november december",
    "fr": "janvier février mars avril mai juin juillet août septembre octobre novembre décembre",
    "es": "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre",
    "it": "gennaio febbraio marzo aprile maggio giugno luglio agosto settembre ottobre novembre dicembre",
}
# {s} is a name or stem, {f} a full name, {n} a noun or an invented word.
STREET = {
    "en": "{s} Street|{s} St|{s} Road|{s} Rd.|{s} Avenue|{s} Ave|{s} Lane|{s} Drive|{s} Close|{s} Court|"
    "{s} Way|{s} Terrace|{s} Boulevard|{s} Crescent|{s} Place|{s} Square|{s} Hill|{s} Row|Old {s} Road|"
    "North {s} Street|Upper {s} Lane|{n} Mews|West {n} Street|The {n} Walk|{f} Drive|County Road {d}|"
    "Highway {d}",
    "de": "{s}straße|{s}str.|{s}weg|{s}allee|{s}gasse|{s}platz|{s}ring|{s}damm|{s}ufer|{s}steig|{f1}-Straße|"
    "{f1}-Allee|Am {n}|An der {n}|Auf dem {n}|Im {s}grund|Alte {s}straße|Zum {n}|Unter den {n}|{s} Straße|"
    "{s}er Weg|{s}er Chaussee|{s}höhe|{s}wiese",
    "nl": "{s}straat|{s}laan|{s}weg|{s}plein|{s}kade|{s}singel|{s}gracht|{s}dijk|{s}hof|{s}pad|{s}steeg|"
    "{s}dreef|{f} straat|{f}laan|Oude {s}weg|Nieuwe {s}straat|Burgemeester {s}straat|Prof. {s}laan|"
    "Lange {s}straat|Het {n}|De {n}|Op de {n}|{s}oord|{s}weide",
    "fr": "rue {s}|Rue {s}|rue de la {n}|Rue du {n}|rue des {n}|avenue {f}|Avenue de {s}|boulevard {s}|"
    "Boulevard {f}|place {s}|Place du {n}|impasse {s}|Impasse des {n}|allée {s}|Allée des {n}|chemin de {s}|"
    "Chemin du {n}|quai {s}|route de {s}|Cours {f}|square {s}|passage {n}|Rue du Docteur {s}|rue Saint-{s}|"
    "sentier {n}",
    "es": "Calle {s}|calle {f}|C/ {s}|Calle de la {n}|Calle del {n}|Avenida {s}|Avda. {f}|Av. de {s}|"
    "Avenida de la {n}|Plaza {s}|Plaza del {n}|Paseo de {s}|Paseo {f}|Camino de {s}|Camino del {n}|"
    "Ronda de {s}|Travesía {s}|Carretera de {s}|Calle San {s}|Pasaje {s}|Glorieta {s}|Cuesta de {n}|"
    "Rambla {s}|Calle Doctor {s}",
    "it": "Via {s}|via {f}|Via {f}|via della {n}|Via del {n}|Via dei {n}|Viale {s}|viale {f}|Corso {s}|"
    "corso {f}|Piazza {s}|piazza {f}|Piazza della {n}|Vicolo {s}|vicolo del {n}|Largo {s}|Strada {s}|"
    "strada della {n}|Contrada {s}|Via San {s}|Lungomare {s}|Piazzale {f}|Via Monte {s}|Salita {s}",
}
# Forms of invented towns; {s} is an invented stem.
TOWN = {
    "en": "{s}ton|{s}ham|{s}bury|{s}field|{s}ford|{s}wick|{s}ville|{s}burgh|{s} Falls|Port {s}|Fort {s}|"
    "{s} Springs|New {s}|East {s}|{s} Hill|Lake {s}|{s}mouth|{s}-on-Sea|St. {s}|{s} upon Avon|Great {s}|"
    "Little {s}|{s} on the Hill|Saint {s} Bay|North {s} City",
    "de": "{s}burg|{s}dorf|{s}heim|{s}hausen|{s}ingen|{s}stadt|{s}bach|{s}berg|{s}feld|{s}brück|Bad {s}|"
    "Neu{t}|Ober{t}|Nieder{t}|Sankt {s}|{s}kirchen|{s}au|{s}itz|{s}ow|{s} am See|{s} an der Weser|"
    "{s} am Wald|Groß {s}|Klein {s}|Markt {s}|{s} im Tal",
    "nl": "{s}dam|{s}drecht|{s}veen|{s}hoven|{s}huizen|{s}wijk|{s}burg|{s}broek|{s}stede|{s}kerk|{s}um|"
    "{s}loo|Nieuw-{s}|Oud {s}|Sint-{s}|{s} aan Zee|{s}recht|{s}voort|{s}lo|{s} aan de Maas|'s-{s}berg|"
    "Den {s}|{s} op de Heide|Klein {s}|Hoek van {s}",
    "fr": "{s}ville|{s}-sur-Loire|{s}-en-Bresse|Saint-{s}|Sainte-{s}|Villeneuve-{s}|{s}court|{s}y|{s}ac|"
    "Mont{t}|La {s}|Le {s}|Château-{s}|{s}-les-Bains|{s}mont|Bourg-{s}|Pont-{s}|{s}igny|{s}-sur-Mer|"
    "{s}-le-Grand|{s} la Forêt|Saint {s} des Bois|Les {s}s|Vieux {s}",
    "es": "San {s}|Santa {s}|Villa {s}|Villa{t}|{s} de la Sierra|Puerto {s}|Castillo de {s}|El {s}|La {s}|"
    "Los {s}es|{s} del Río|Torre{t}|Monte{t}|Alcalá de {s}|{s}ada|{s}eda|Aldea{t}|Fuente{t}|"
    "San {s} de los Valles|Nueva {s}|{s} el Grande|Vieja {s} los bajos|Santa {s} de las Torres|"
    "{s} de arriba|Los {s}|{s} los altos",
    "it": "San {s}|Santa {s}|Villa {s}|Monte{t}|Castel {s}|Borgo {s}|{s}ano|{s}ate|{s}ello|{s} Marittima|"
    "{s}asco|Rocca{t}|Torre {s}|{s} sul Mare|Campo{t}|Ponte {s}|{s}ona|{s}ara|Pieve di {s}|{s} a Mare|"
    "Sant'{s}|{s} del Monte|San {s} in Valle|{s} Superiore|{s} sul Naviglio",
}
COMPANY = {
    "en": "{l} Ltd|{l} & Sons|{l} Inc.|{i} LLC|{i}|{l} and {k}|{i} Group|{l} Logistics|{i} Holdings plc|"
    "The {n} Company|{i} Systems|{l} Bros.|{n}works|Bank of {c}",
    "de": "{l} GmbH|{l} & Söhne|{l} AG|{i} GmbH & Co. KG|{i}|{l} und {k} OHG|{i} Gruppe|{l} Logistik|{i} SE|"
    "{n}werk {c}|{i} Systeme|Gebrüder {l}|Sparkasse {c}|{n}haus {l}",
    "nl": "{l} B.V.|{l} & Zonen|{i} N.V.|{i} BV|{i}|{l} en {k}|{i} Groep|{l} Transport|{l} Bouw|"
    "{n}handel {l}|{i} Techniek|Gebroeders {l}|{i} Holding|Bank van {c}",
    "fr": "{l} SARL|{l} et Fils|{l} SA|{i} SAS|{i}|{l} et {k}|Groupe {i}|{l} Transports|Établissements {l}|"
    "Maison {l}|{i} Services|Société {i}|Banque de {c}|Atelier {n}",
    "es": "{l} S.L.|{l} e Hijos|{l} S.A.|{i} SL|{i}|{l} y {k}|Grupo {i}|Transportes {l}|Talleres {l}|"
    "Hermanos {l}|{i} Servicios|Construcciones {l}|Banco de {c}|Casa {l}",
    "it": "{l} S.r.l.|{l} e Figli|{l} S.p.A.|{i} Srl|{i}|{l} & {k}|Gruppo {i}|Trasporti {l}|Officine {l}|"
    "Fratelli {l}|{i} Servizi|Ditta {l}|Banca di {c}|Bottega {l}",
}
PARTICLES = {
    "en": ("Mc", "Mac", "O'", "St. ", "Van ", "De "),
    "de": ("von ", "von der ", "zu ", "vom ", "van ", "von und zu "),
    "nl": ("van ", "van der ", "van den ", "de ", "van de ", "ten ", "ter ", "'t ", "Van ", "van 't ", "De "),
    "fr": ("de ", "Le ", "La ", "du ", "de la ", "d'", "Des"),
    "es": ("de ", "de la ", "del ", "de los "),
    "it": ("De ", "Di ", "D'", "Della ", "Lo ", "La ", "Dal ", "Del "),
}

# Patterns: # is a digit, % a digit but 0, @ an upper-case letter, & a lower-case letter, ? an upper-case
# letter or a digit; other characters stay.
ZIP = {
    "en": "#####|#####-####|#####|@@% #@@|@@%# #@@|@% #@@|@%#@ #@@|####|@#@ #@#",
    "de": "#####|#####|#####|D-#####|####|CH-####|A-####",
    "nl": "%### @@|%###@@|%### @@|####|B-####|%###",
    "fr": "#####|#####|F-#####|####|## ###|CH-####",
    "es": "#####|#####|E-#####|0####|####",
    "it": "#####|#####|I-#####|IT-#####|CH-####",
}
PHONE = {
    "en": "(%##) ###-####|%##-###-####|+1 %## ### ####|+1-%##-###-####|%##.###.####|07### ######|"
    "+44 7### ######|020 #### ####|01### ### ###|+44 (0)20 #### ####|%#########|1-8##-###-####",
    "de": "0%## ########|0%##/#######|+49 %## #######|+49 (0)%## ### ####|0049 1## ########|01## #######|"
    "(0%##) ### ## ##|0%###-######|+43 6## #######|+41 7# ### ## ##",
    "nl": "06-########|06 #### ####|06########|+31 6 ########|+31 %# ### ## ##|0%#-#######|0%## ######|"
    "(0%##) ######|0031 6########|+32 4## ## ## ##|04##/##.##.##",
    "fr": "0% ## ## ## ##|0%########|0%.##.##.##.##|+33 % ## ## ## ##|+33%########|(+33) 6 ## ## ## ##|"
    "0033 % ########|06-##-##-##-##|+41 ## ### ## ##|+32 4## ## ## ##",
    "es": "6## ### ###|9## ## ## ##|+34 6## ### ###|+34 6########|9########|6##-###-###|(+34) 9## ### ###|"
    "0034 6## ## ## ##|7## ## ## ##|+52 55 #### ####|%## ######",
    "it": "3## #######|3## ### ####|+39 3## #######|+39 0%# #######|0%#-#######|0%# ### ####|0%##/######|"
    "(0%#) ########|3#########|0039 3## ### ## ##|3##.###.####",
}
CARD = (
    "4### #### #### ####|5### #### #### ####|4###############|5%##-####-####-####|3%## ###### #####|"
    "3%#############|6###.####.####.####|5%##############|%#################|#### #### #### ### ####|"
    "%### ####-####/####|4############|%#### ##### ######"
)
ACCOUNT = {
    "en": "GB## @@@@ #### #### #### ##|GB##@@@@##############|########|##-##-## ########|#########-#####|"
    "%##########|####-######-##|IE##@@@@##############",
    "de": "DE## #### #### #### #### ##|DE####################|##########|%######|AT## #### #### #### ####|"
    "CH## #### #### #### #### #|### ### ### ##",
    "nl": "NL## @@@@ #### #### ##|NL##@@@@##########|NL##@@@@##########|BE## #### #### ####|%# ## ## ###|"
    "###.###.###|##########",
    "fr": "FR## #### #### #### #### #### ###|FR#########################|##### ##### ########### ##|"
    "LU## #### #### #### ####|###########|FR76 #### #### ####",
    "es": "ES## #### #### #### #### ####|ES######################|#### #### ## ##########|"
    "####-####-##-##########|ES## #### #### ## ##########|##################",
    "it": "IT##@##########????????????|IT## @ ##### ##### ############|IT## @##### ##### ############|"
    "############|%###########|SM##@######################",
}
IDCARD = {
    "en": "#########|@########|@@######|@@ ######|###-####-###|@-######-#|%########|PA#######|@#######|"
    "##.###.###",
    "de": "@??##?##?#|@##??#?##|L########|##########|@ ##### ####|T########D|@??##?##?-#",
    "nl": "@@#######|NX#?#?##?|@@?#?##?#|I@#######|###-#######-##|SPEC?####",
    "fr": "############|##@@#####|@#@#@#@##|##AA#####|############-#|X#??####?|## ## ## ###",
    "es": "########@|########-@|##.###.###-@|@@@######|X#######@|Y-#######-@|########",
    "it": "CA#####@@|AX#######|@@#######|@@ #######|AT ######@|YA#######|@######",
}
SOCIAL = {
    "en": "###-##-####|### ## ####|#########|@@ ## ## ## @|@@######@|@@ ###### @|756.####.####.##|"
    "###-###-###",
    "de": "## ###### @ ###|########@###|##-######-@-###|756.####.####.##|#### ######|##/######/@##",
    "nl": "#########|####.##.###|### ### ###|####-##-###|##.##.##-###.##",
    "fr": "# ## ## ## ### ### ##|###############|1 ## ## ## ### ###|2##############|# ## ## 2A ### ### ##",
    "es": "##/########/##|## ######## ##|############|##-########-##|##/##########",
    "it": "@@@@@@##@##@###@|@@@ @@@ ##@## @###@|@@@@@@##@##@###@|756.####.####.##|@@@@@@@@######",
}
TAX = {
    "en": "##-#######|9##-##-####|##########|##### #####|GB#########|GB ### #### ##|##/###/####|IE#######@@",
    "de": "###########|## ### ### ###|##/###/#####|###/####/####|DE#########|### ### #####|##### #####",
    "nl": "#########B##|NL#########B0#|NL ### ### ### B##|#########|####.##.###",
    "fr": "#############|## ## ### ### ###|FR ## #########|FR###########|### ### ### #####",
    "es": "########@|@########|@-########|########-@|ES@########|@#######@",
    "it": "###########|IT###########|IT ### #### ####|@@@@@@##@##@###@|###/########",
}
LICENCE = {
    "en": "@@@@@######@@#@@|@#######|@###-####-####|@### ### ## ###|########|@############|##@#####|"
    "@@-###-###|@@@@@###@@",
    "de": "@##########|?##????##?#|@###@##@#@#|@?######?@#|@@@ ####/##|@########@#",
    "nl": "##########|%#########|### ### ####|@#########|##-##-######",
    "fr": "############|##@@#####|## @@ #####|############@|##-##-######",
    "es": "########-@|########@|@-########/#|##.######-@|########@-#",
    "it": "@@#######@|U1#######@|@@#######|TN#######@|U1?######@|@@ #######@",
}
NUMBER = "%|%#|%#|%##|%###|%,###|%.###|%#.###|%#####|%,#|%.##|#.##|%# ###"


def fill(pattern, rng):
    """Replaces # % @ & ? of the pattern by random characters."""
    draw = rng.random
    out = []
    for character in pattern:
        if character == "#":
            character = "0123456789"[int(draw() * 10)]
        elif character == "%":
            character = "123456789"[int(draw() * 9)]
        elif character == "@":
            character = string.ascii_uppercase[int(draw() * 26)]
        elif character == "&":
            character = string.ascii_lowercase[int(draw() * 26)]
        elif character == "?":
            character = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"[int(draw() * 36)]
        out.append(character)
    return "".join(out)


def learn(words):
    """Returns {two or three characters: all characters that follow them in the words}; "$" ends a word."""
    chain = {}
    for word in words:
        padded = "^^^" + word.lower() + "$"
        for i in range(3, len(padded)):
            for width in (2, 3):
                chain.setdefault(padded[i - width : i], []).append(padded[i])
    return {context: "".join(following) for context, following in chain.items()}


def invent(chain, rng, low=3, high=11):
    """Returns a capitalized word of low to high characters, drawn from the chain."""
    draw = rng.random
    while True:
        word = "^^^"
        width = 3 if draw() < 0.5 else 2
        while word[-1] != "$" and len(word) < high + 4:
            following = chain[word[-width:]]
            word += following[int(draw() * len(following))]
        word = word[3:].rstrip("$")
        if low <= len(word) <= high:
            return word[0].upper() + word[1:]


_ONSETS = "b br c ch d dr f fl g gr h j k kl l l m m n n p pr qu r r s st sh t tr v w z".split()


def syllables(rng):
    """Returns a word of one to four syllables that belongs to no language."""
    parts = (
        rng.choice(_ONSETS) + rng.choice("aaeeiioou") + rng.choice(("", "", "", "n", "s", "r", "l", "m", "x"))
        for _ in range(rng.choice((1, 2, 2, 2, 3, 3, 4)))
    )
    return "".join(parts).capitalize()


def _split(text):
    return [item.strip() for item in text.replace("\n", " ").split("|")]


_FIRST = {language: text.split() for language, text in FIRST.items()}
_LAST = {language: text.split() for language, text in LAST.items()}
_CITY = {language: _split(text) for language, text in CITY.items()}
_LISTS = {
    slot: {language: text.split() for language, text in table.items()}
    for slot, table in (("country", COUNTRY), ("animal", ANIMAL), ("color", COLOR), ("months", MONTHS))
}
_LISTS["job"] = {language: _split(text) for language, text in JOB.items()}
_TABLES = {"zip": ZIP, "phone": PHONE, "card": CARD, "account": ACCOUNT, "idcard": IDCARD, "social": SOCIAL}
_TABLES |= {
    "tax": TAX,
    "licence": LICENCE,
    "number": NUMBER,
    "street": STREET,
    "town": TOWN,
    "company": COMPANY,
}
_PATTERNS = {
    slot: {language: _split(table[language] if isinstance(table, dict) else table) for language in LANGUAGES}
    for slot, table in _TABLES.items()
}
_CHAINS = {
    (kind, language): learn(words)
    for kind, table in (("first", _FIRST), ("last", _LAST), ("city", _CITY))
    for language, words in table.items()
}


def first(lang, rng, known):
    """Returns a first name: listed, invented, compound or an initial."""
    roll = rng.random()
    if roll < 0.03:
        return fill("@.", rng)
    if roll < 0.07:
        return syllables(rng)
    name = rng.choice(_FIRST[lang]) if roll < 0.53 else invent(_CHAINS["first", lang], rng)
    if rng.random() < 0.08:
        name += {"fr": "-", "de": "-"}.get(lang, " ") + rng.choice(_FIRST[lang])
    return name


def last(lang, rng, known):
    """Returns a last name: listed or invented, sometimes with a particle, doubled or hyphenated."""
    roll = rng.random()
    if roll < 0.04:
        return syllables(rng)
    name = rng.choice(_LAST[lang]) if roll < 0.5 else invent(_CHAINS["last", lang], rng)
    roll = rng.random()
    if roll < (0.2 if lang == "nl" else 0.07):
        return rng.choice(PARTICLES[lang]) + name
    if roll < 0.27 or (lang == "es" and roll < 0.45):
        second = rng.choice(_LAST[lang]) if rng.random() < 0.5 else invent(_CHAINS["last", lang], rng)
        return name + (" " if lang == "es" else "-") + second if roll > 0.23 else name
    return name


def city(lang, rng, known):
    """Returns a town from the list or an invented one."""
    if rng.random() < 0.45:
        return rng.choice(_CITY[lang])
    stem = invent(_CHAINS["city" if rng.random() < 0.5 else "last", lang], rng, 3, 8)
    if rng.random() < 0.25:
        return stem
    return rng.choice(_PATTERNS["town"][lang]).format(s=stem, t=stem.lower())


def _noun(lang, rng, known):
    return rng.choice(known.nouns) if rng.random() < 0.8 and known.nouns else syllables(rng)


def street(lang, rng, known):
    """Returns a street in a form of the language, with a listed or an invented name."""
    form = rng.choice(_PATTERNS["street"][lang])
    roll = rng.random()
    if roll < 0.4:
        stem = rng.choice(_LAST[lang])
    else:
        stem = invent(_CHAINS["last" if roll < 0.7 else "city", lang], rng, 3, 9)
    noun = _noun(lang, rng, known).capitalize()
    given = rng.choice(_FIRST[lang])
    return form.format(s=stem, n=noun, f=f"{given} {stem}", f1=f"{given}-{stem}", d=fill("%#", rng))


def building(lang, rng, known):
    """Returns a house number: 7, 12a, 3-5, 12 bis, 4/B."""
    number = fill(rng.choice(("%", "%#", "%#", "%##", "%###")), rng)
    roll = rng.random()
    if roll < 0.7:
        return number
    if roll < 0.78:
        return number + {"fr": " bis", "it": "/B", "es": "-A", "nl": "-hs"}.get(lang, "b")
    return number + (rng.choice("abcdefABC") if roll < 0.93 else "-" + fill("%#", rng))


def ascii_word(text):
    """Returns the letters and digits of a text in lower-case ASCII, for e-mail addresses and user names."""
    return re.sub(r"[^a-z0-9]", "", text.lower().translate(_PLAIN))


_PLAIN = str.maketrans("áàâäãåçéèêëíìîïñóòôöõúùûüýÿß", "aaaaaaceeeeiiiinooooouuuuyys")


def _handle(lang, rng, known):
    """Returns a login made of names of the text, of new names, or of random characters."""
    roll = rng.random()
    if roll < 0.2:
        return fill("&" * rng.randint(4, 10) + "#" * rng.randint(0, 5), rng)
    given = ascii_word(known.recall("first", rng) or first(lang, rng, known))
    family = ascii_word(known.recall("last", rng) or last(lang, rng, known))
    if roll < 0.4:
        word = ascii_word(_noun(lang, rng, known)) + rng.choice(("", "_", ".", "-"))
        return word + rng.choice((given, family, fill("###", rng)))
    forms = "{g}.{f} {g}{f} {g0}{f} {f}.{g} {g}_{f} {g} {f} {g}-{f} {g0}.{f} {f}{g0}".split()
    login = rng.choice(forms).format(g=given, f=family, g0=given[:1])
    return login + (fill("#" * rng.randint(1, 4), rng) if rng.random() < 0.45 else "")


def email(lang, rng, known):
    """Returns an e-mail address at an invented or a common host."""
    if rng.random() < 0.6:
        host = ascii_word(syllables(rng) if rng.random() < 0.5 else last(lang, rng, known))
    else:
        host = rng.choice("mail gmail outlook posteo web yahoo icloud example hotmail".split())
    national = ("co.uk", "com") if lang == "en" else (lang, lang)
    tld = rng.choice(("com", "org", "net", "eu", "info", "io", *national))
    return f"{_handle(lang, rng, known)}@{host}.{tld}"


def user(lang, rng, known):
    """Returns a user name, sometimes with an @."""
    name = _handle(lang, rng, known)
    roll = rng.random()
    if roll < 0.15:
        name = name.title().replace(".", "")
    return ("@" if roll > 0.9 else "") + name


def password(lang, rng, known):
    """Returns a password: random characters, or a word with digits and signs."""
    if rng.random() < 0.55:
        signs = rng.choice(("", "!#$%&*?", "!@#$%^&*()_+-=[]{}~/|;:,.?<>'\""))
        alphabet = string.ascii_letters + string.digits + signs
        return "".join(rng.choice(alphabet) for _ in range(rng.randint(5, 16)))
    noun, invented = _noun(lang, rng, known), syllables(rng)
    word = rng.choice((noun, invented, known.recall("first", rng) or first(lang, rng, known)))
    word = word.replace(" ", "")
    word = rng.choice((word, word.capitalize(), word.translate(str.maketrans("aeios", "43105"))))
    return word + fill(rng.choice(("##", "####", "!", "_##", "#!", "##$", "*###", "?#", "-@&#", "")), rng)


def _day_number(lang, d):
    if lang != "en":
        return {"fr": "1er", "it": "1º"}.get(lang, str(d)) if d == 1 else str(d)
    return str(d) + {1: "st", 2: "nd", 3: "rd"}.get(0 if 10 < d < 14 else d % 10, "th")


# {o} is the ordinal of the day, {M} the month, {S} its first three letters, {s} the year without century.
_LONG_DATES = {
    "en": "{M} {d}, {y}|{d} {M} {y}|{o} of {M} {y}|{M} {o}, {y}|{S} {d} {y}|{d} {S} {y}|{M} {o}|{d} {M}|"
    "{S}. {d}, {y}|{M}/{s:02}|{S}/{s:02}|{M} {y}|{d:02}-{S}-{y}",
    "de": "{d}. {M} {y}|{d}. {M}|{d}. {S}. {y}|{M} {y}|{d:02}. {M} {y}|{S} {s:02}|{M}/{s:02}|{d}. {S} {s:02}",
    "es": "{d} de {M} de {y}|{d} de {M}|{M} de {y}|{d} {S} {y}|{d}-{S}-{y}|{d} de {M} del {y}|{M}/{s:02}|"
    "{d:02} {M} {y}",
    "other": "{o} {M} {y}|{d} {M}|{M} {y}|{d} {S} {y}|{d:02} {M} {y}|{d}-{S}-{y}|{M}/{s:02}|{d} {S}. {s:02}",
}
_LONG_DATES = {language: forms.split("|") for language, forms in _LONG_DATES.items()}
_SHORT_DATES = (
    "{d:02}-{m:02}-{y}|{d:02}/{m:02}/{y}|{d:02}.{m:02}.{y}|{y}-{m:02}-{d:02}|{y}/{m:02}/{d:02}|{d}/{m}/{s:02}|"
    "{d}.{m}.{y}|{d}-{m}-{s:02}|{m:02}/{y}|{m:02}/{s:02}|{d}/{m}|{d:02} {m:02} {y}|{y}{m:02}{d:02}|"
    "{y}-{m:02}-{d:02}T00:00:00|{y}-{m:02}-{d:02}T{h:02}:{n:02}:00Z|{y}-{m:02}-{d:02} {h:02}:{n:02}|"
    "{d:02}.{m:02}.{s:02}|{d}/{m}/{y}"
).split("|")


def _long_date(lang, rng, d, month, year):
    """Returns a date with the name of its month."""
    form = rng.choice(_LONG_DATES.get(lang, _LONG_DATES["other"]))
    parts = {"o": _day_number(lang, d), "M": month, "S": month[:3], "y": year, "s": year % 100}
    return form.format(d=d, **parts)


def day(lang, rng, low, high):
    """Returns a date of the years low to high in one of some thirty formats."""
    y, m, d = rng.randint(low, high), rng.randint(1, 12), rng.randint(1, 28)
    if rng.random() < 0.5:
        return _long_date(lang, rng, d, _LISTS["months"][lang][m - 1], y)
    if lang == "en" and rng.random() < 0.4:
        d, m = m, d
    form = rng.choice(_SHORT_DATES)
    return form.format(d=d, m=m, y=y, s=y % 100, h=rng.randint(0, 23), n=rng.randint(0, 59))


def time(lang, rng, known):
    """Returns a time of the day."""
    h, n = rng.randint(0, 23), rng.randint(0, 59)
    if lang == "en" and rng.random() < 0.5:
        return f"{h % 12 + 1}{rng.choice((f':{n:02}', '', '.30'))}{rng.choice((' pm', ' am', 'pm', ' p.m.'))}"
    return f"{h}{ {'fr': 'h', 'es': ':', 'en': ':'}.get(lang, '.') if rng.random() < 0.4 else ':' }{n:02}" + (
        f":{rng.randint(0, 59):02}" if rng.random() < 0.08 else ""
    )


def price(lang, rng, known):
    """Returns an amount of money."""
    amount = fill(rng.choice(("%#", "%##", "%.##", "%#.##", "%##.##", "%,###", "%,###.##")), rng)
    if lang == "en":
        return rng.choice(("$", "£", "€", "USD ", "GBP ")) + amount
    amount = amount.translate(str.maketrans(".,", ",."))
    euro = "{} Euro" if lang == "de" else "{} euro"
    return rng.choice(("{} €", euro, "€ {}", "EUR {}", "{}€", "{} CHF")).format(amount)


def company(lang, rng, known):
    """Returns a company named after people, a town, a noun or nothing."""
    return rng.choice(_PATTERNS["company"][lang]).format(
        l=rng.choice(_LAST[lang]) if rng.random() < 0.5 else invent(_CHAINS["last", lang], rng),
        k=rng.choice(_LAST[lang]),
        i=syllables(rng) + rng.choice(("", "", "tec", "soft", "ex", "ia")),
        n=_noun(lang, rng, known).capitalize(),
        c=rng.choice(_CITY[lang]),
    )


def product(lang, rng, known):
    """Returns a product: a noun or an invented brand, sometimes with a model code."""
    name = _noun(lang, rng, known) if rng.random() < 0.45 else syllables(rng)
    if rng.random() >= 0.6:
        return name
    codes = ("###", "@##", "@@-###", "%0", "X%", "%000", "Pro", "mini", "@@ ##", "Plus")
    return f"{name} {fill(rng.choice(codes), rng)}"


def rand(lang, rng, known):
    """Returns a string of 2 to 14 random letters, digits or both, or an invented word in any case."""
    roll = rng.random()
    if roll < 0.3:
        word = syllables(rng) + (syllables(rng).lower() if rng.random() < 0.3 else "")
        return rng.choice((word, word.lower(), word.upper()))
    size = rng.randint(2, 14)
    if roll < 0.85:
        return fill(rng.choice(("&", "@", "#", "?", "#&")) * size, rng)[:size]
    return fill("".join(rng.choice("&&@@##-_./") for _ in range(size)), rng)


_DOCUMENTS = ("card", "account", "idcard", "social", "tax", "licence")
_OWN_FORM = (first, last, city, street, building, email, user, password, time, price, company, product, rand)
_MAKERS = {maker.__name__: maker for maker in _OWN_FORM}


def _number_like(slot, lang, rng):
    """Returns a number of the slot's patterns.

    One in five is of another country; one in eight numbers of documents has the form of no country.
    """
    if rng.random() < 0.2:
        lang = rng.choice(LANGUAGES)
    if slot in _DOCUMENTS[1:] and rng.random() < 0.12:
        parts = ("##", "###", "@", "####", "?", "-", " ", "#")
        pattern = "".join(rng.choice(parts) for _ in range(rng.randint(3, 6))) + "##"
        return fill(pattern, rng).strip(" -")
    return fill(rng.choice(_PATTERNS[slot][lang]), rng)


def draw(slot, lang, rng, known):
    """Returns a value for a slot.

    `known` has .nouns (words of the language) and .recall(slot, rng) (a value that was used before, or None).
    """
    if slot in ("first", "last", "city", "street") and rng.random() < 0.12:
        lang = rng.choice(LANGUAGES)
    if slot in _MAKERS:
        return _MAKERS[slot](lang, rng, known)
    if slot in _PATTERNS:
        return _number_like(slot, lang, rng)
    if slot in _LISTS:
        return rng.choice(_LISTS[slot][lang])
    if slot == "birthdate":
        return day(lang, rng, 1925, 2016)
    if slot == "date":
        return day(lang, rng, 1990, 2034)
    if slot == "year":
        return str(rng.randint(1900, 2035))
    if slot == "percent":
        return fill(rng.choice(("%", "%#", "%,#", "%#.#", "100")), rng) + rng.choice(("%", " %"))
    if slot == "word":
        return _noun(lang, rng, known)
    raise ValueError(f"{{{slot}}} is no slot of the recipe; use one of the slots in the `kinds` section")


_OTHER_SLOTS = (
    "zip phone card account idcard social tax licence number country animal color job birthdate date year "
    "percent word"
).split()
SLOTS = (*_MAKERS, *_OTHER_SLOTS)
